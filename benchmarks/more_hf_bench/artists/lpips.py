"""LPIPS between two sets of pictures, at their own size and with the two resizes of published tables."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from more_hf.tuning.judge import lpips_distance


NATIVE, ANTIALIASED, PLAIN = COLUMNS = ("lpips", "lpips_64", "lpips_64_rece")  # of `rows.csv`
DESCRIPTION = (
    "LPIPS(alex) 0.1; native size, and resized to 64 with (lpips_64) and without (lpips_64_rece) antialias"
)


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
