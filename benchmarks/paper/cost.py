"""How long each preset takes on one GPU, estimated from its counted work.

    python benchmarks/paper/cost.py

Writes cost.md. The operations of a network are counted on tensors without data; the images, epochs and
methods are those of the presets and of the methods' defaults. Nothing was run on a GPU: the hours are these
operations at the rates below, which convolutions and attention reach on an A100, and leave out what a CPU
does beside it: decoding, and the measurements of scikit-learn.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.classes.models import MODELS
from more_hf_bench.classes.training import FINE_TUNING, RECIPES, Recipe
from more_hf_bench.cli.options import presets
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.run import method_settings


HERE = Path(__file__).parent
FLOAT32, BFLOAT16 = 12e12, 120e12  # operations a second
BACKWARD = 3  # a training step takes this many times what a forward pass takes
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
IMAGES = {"cifar10": 60_000, "cifar100": 60_000, "tiny-imagenet": 110_000, "imagenet-1k": 1_331_167}
ON_FORGOTTEN = ("neggrad", "boundary-shrink", "esc-t", "lau")  # read the forgotten tenth alone


@dataclass(frozen=True)
class Work:
    """The operations of a preset in each precision."""

    float32: float
    bfloat16: float = 0.0

    @property
    def hours(self) -> float:
        return (self.float32 / FLOAT32 + self.bfloat16 / BFLOAT16) / 3600


def operations(module: nn.Module, *inputs, **named) -> int:
    """Multiplications and additions of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **named)
    return counter.get_total_flops()


def of_an_image() -> float:
    """Of drawing a picture of 512 pixels with Stable Diffusion v1.4, in one step: the UNet twice; its VAE."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(latent_channels=4, **VAE)
        latents, text = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
        return operations(unet, latents, torch.tensor(1, device="meta"), text), operations(
            vae.decoder, latents[:1]
        )


def of_pictures(preset: dict) -> Work:
    """All pictures before and after, and the pictures and steps that CA and ESD train with."""
    step, decoder = of_an_image()
    forgotten, prompts = len(preset["forget"]), 220
    pictures = prompts * (1 + forgotten * (len(preset["methods"]) - 1))
    drawn = pictures * (preset["steps"] * step + decoder)
    ca = 1000 * (25 * step + decoder) + 200 * 4 * BACKWARD * step
    esd = 1000 * (25 * step + BACKWARD * step)  # up to a random one of 50 steps
    return Work(drawn + forgotten * (ca + esd))


def of_classes(preset: dict) -> Work:
    """The original's and Retrain's training, the methods' epochs, and a pass for each model's features."""
    name, images = preset["dataset"], IMAGES[preset["dataset"]]
    size = 224 if "/" in preset["model"] else 32
    with torch.device("meta"):
        model = network(preset["model"], size)
        forward = operations(model, pixel_values=torch.empty(1, 3, size, size))
    epochs = preset.get("epochs")
    if epochs is None:
        kind = preset["model"] if preset["model"] in MODELS else model.config.model_type
        recipe = FINE_TUNING.get(kind) or RECIPES.get(f"{name}, {kind}") or RECIPES.get(name, Recipe())
        epochs = recipe.epochs
    trained, passes = 0.0, 0.0
    for method in preset["methods"]:
        passes += 1  # for its features, or for its cost
        if method not in ("original", "retrain") and CLASSIFICATION[method].trained:
            share = 0.1 if method in ON_FORGOTTEN else 1.0
            trained += share * method_settings(CLASSIFICATION[method].load(), without=("splits",)).get(
                "epochs", 1
            )
    seeds, work = preset["seeds"], forward * images
    originals = 2 * epochs * BACKWARD * work * seeds
    others = (trained * BACKWARD + passes) * work * seeds
    if preset.get("mixed_precision") == "bf16":
        return Work(others, originals)
    return Work(originals + others)


def network(name: str, size: int) -> nn.Module:
    """The classifier of a preset, without data."""
    if name in MODELS:
        from transformers import AutoModelForImageClassification

        config = MODELS[name](size, num_channels=3, num_labels=10)
        return AutoModelForImageClassification.from_config(config)
    if "resnet" in name:
        config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
        return ResNetForImageClassification(config)
    return ViTForImageClassification(ViTConfig())


def main() -> None:
    rows = []
    for bench, count in (("artists", of_pictures), ("kd", of_classes)):
        for name, path in presets(bench).items():
            work = count(tomllib.loads(path.read_text("utf-8")))
            petaflop = (work.float32 + work.bfloat16) / 1e15
            rows.append(
                {"preset": name, "10^15 operations": f"{petaflop:,.0f}", "hours": f"{work.hours:.1f}"}
            )
    write_text(HERE / "cost.md", markdown_table(rows) + "\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
