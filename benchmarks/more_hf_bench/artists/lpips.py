"""LPIPS between two sets of pictures, at their own size and with the two resizes of published tables."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from more_hf.data import load_lpips


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


@functools.lru_cache(maxsize=1)
def _lpips(device: torch.device):
    return load_lpips().to(device)
