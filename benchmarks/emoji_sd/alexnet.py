"""LPIPS(alex) from one safetensors file, with no download.

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
