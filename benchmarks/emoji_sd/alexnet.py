"""LPIPS(alex) and AlexNet features from one safetensors file, with no download.

The file holds torchvision's AlexNet convolutions (IMAGENET1K_V1, BSD-3-Clause); the linear layers of LPIPS come with
`lpips`.
"""

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file


def load_lpips(path: Path) -> torch.nn.Module:
    """LPIPS(alex), frozen: model(x, y) -> (n, 1, 1, 1) for images (n, 3, h, w) in [-1, 1]."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips builds torchvision's model with a deprecated argument
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    tensors = load_file(path)
    convolutions = [m for m in model.net.modules() if isinstance(m, torch.nn.Conv2d)]
    for convolution, index in zip(convolutions, (0, 3, 6, 8, 10), strict=False):
        convolution.weight.data.copy_(tensors[f"features.{index}.weight"])
        convolution.bias.data.copy_(tensors[f"features.{index}.bias"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def pooled_features(lpips_model: torch.nn.Module, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """(n, 3 * 1152) float32: mean, deviation and maximum over the image of AlexNet's five layers.

    images: (n, 3, 64, 64) in [-1, 1]; they are enlarged to 128 first, since AlexNet's first stride would eat thin
    lines.
    """
    rows = []
    for batch in images.split(batch_size):
        x = torch.nn.functional.interpolate(batch, size=(128, 128), mode="bilinear", align_corners=False)
        layers = lpips_model.net(lpips_model.scaling_layer(x))
        rows.append(torch.cat([f(h) for h in layers for f in (_mean, _deviation, _maximum)], dim=1))
    return torch.cat(rows)


def _mean(h: torch.Tensor) -> torch.Tensor:
    return h.mean((2, 3))


def _deviation(h: torch.Tensor) -> torch.Tensor:
    return h.std((2, 3))


def _maximum(h: torch.Tensor) -> torch.Tensor:
    return h.amax((2, 3))
