"""LPIPS between two sets of pictures, at their own size and with the two resizes of published tables."""

from __future__ import annotations

import functools
import warnings

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from more_hf.data import FOLDER


NATIVE, ANTIALIASED, PLAIN = COLUMNS = ("lpips", "lpips_64", "lpips_64_rece")  # of `rows.csv`
DESCRIPTION = (
    "LPIPS(alex) 0.1; native size, and resized to 64 with (lpips_64) and without (lpips_64_rece) antialias"
)


def lpips_distance(a: Tensor, b: Tensor, *, batch_size: int = 64) -> Tensor:
    """
    Measure LPIPS(alex) between two sets of images, pair by pair.

    Args:
        a (`torch.Tensor`):
            uint8 of shape `(n, 3, H, W)`.
        b (`torch.Tensor`):
            uint8 of the same shape, on the same device.
        batch_size (`int`, *optional*, defaults to 64):
            Pairs per forward pass.

    Returns:
        `torch.Tensor`: float32 of shape `(n,)`, on the CPU; 0 for equal images.

    Raises:
        ValueError: the shapes differ, or the images are not uint8.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"Images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}. "
            "Generate both sets with the same settings."
        )
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"LPIPS pairs are uint8 images in [0, 255]; got {a.dtype} and {b.dtype}.")
    metric = _lpips(a.device)
    distances = []
    with torch.no_grad():
        for x, y in zip(a.split(batch_size), b.split(batch_size), strict=True):
            distances.append(metric(x.float() / 127.5 - 1, y.float() / 127.5 - 1).flatten().cpu())
    return torch.cat(distances) if distances else torch.empty(0)


def all_distances(before: Tensor, after: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Measure LPIPS in each of the three ways: column -> distances `(n,)`, on the CPU."""
    if before is after:
        return dict.fromkeys(COLUMNS, torch.zeros(len(after)))
    before, after = before.to(device), after.to(device)
    native = lpips_distance(before, after)
    if before.shape[-2:] == (64, 64):
        return dict.fromkeys(COLUMNS, native)
    distances = {NATIVE: native}
    for name, antialias in ((ANTIALIASED, True), (PLAIN, False)):
        small = [resize_64(images, antialias=antialias) for images in (before, after)]
        distances[name] = lpips_distance(*small)
    return distances


def resize_64(images: Tensor, *, antialias: bool) -> Tensor:
    """
    Resize uint8 images to 64 x 64, bilinear, rounded to uint8: with antialiasing as UCE measures, without as
    RECE does.
    """
    small = interpolate(images.float(), (64, 64), mode="bilinear", align_corners=False, antialias=antialias)
    return small.round().clamp(0, 255).to(torch.uint8)


def load_lpips() -> nn.Module:
    """
    Build LPIPS(alex), version 0.1, without a download and without touching the random state.

    The `lpips` package has the linear layers; the convolutions of torchvision's AlexNet ship with `more_hf`.

    Returns:
        `lpips.LPIPS`: float32, on the CPU, in evaluation mode, no parameter requires a gradient. It takes two
        `(n, 3, H, W)` batches with values in `[-1, 1]` and returns `(n, 1, 1, 1)`.
    """
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torchvision renamed the argument that lpips passes to it.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)

    # lpips cuts torchvision's `features` into `slice1` to `slice5` and keeps each layer's number.
    weights = load_file(FOLDER / "lpips" / "alexnet_features.safetensors")
    names = list(metric.net.state_dict())
    metric.net.load_state_dict({name: weights[f"features.{name.split('.', 1)[1]}"] for name in names})
    return metric.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def _lpips(device: torch.device):
    return load_lpips().to(device)
