"""Write the trained parts as one StableDiffusionPipeline folder: float16, the text encoder float32.

    python export.py --vae VAE/vae --text TEXT --denoiser DENOISER --output emoji_sd

The folder opens in plain diffusers: StableDiffusionPipeline.from_pretrained("emoji_sd").
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from train_denoiser import NOISE, build_unet
from transformers import CLIPTextModel, CLIPTokenizer

from more_hf_bench.script import argument_parser


def load_ema(denoiser: Path, text_width: int) -> UNet2DConditionModel:
    """The EMA: DENOISER/unet after training, or from the checkpoint of a run that is still going."""
    checkpoint = denoiser / "checkpoint.pt"
    if (denoiser / "unet").exists() and not checkpoint.exists():
        return UNet2DConditionModel.from_pretrained(denoiser / "unet")
    ema = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"]
    channels, latent_channels = ema["conv_in.weight"].shape[:2]
    unet = build_unet(text_width, latent_channels, smoke=channels == 32)
    unet.load_state_dict(ema)
    return unet


def build_pipeline(vae: Path, text: Path, denoiser: Path) -> StableDiffusionPipeline:
    """The parts in float32, as trained."""
    autoencoder = AutoencoderKL.from_pretrained(vae)
    autoencoder.register_to_config(**json.loads((denoiser / "latents.json").read_text()))
    scheduler = DPMSolverMultistepScheduler(
        **NOISE,
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
    )
    encoder = CLIPTextModel.from_pretrained(text / "text_encoder")
    return StableDiffusionPipeline(
        vae=autoencoder,
        unet=load_ema(denoiser, encoder.config.hidden_size),
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--denoiser", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--smoke", action="store_true", help="accepted like in the other scripts; export is quick anyway"
    )
    args = parser.parse_args()

    pipe = build_pipeline(args.vae, args.text, args.denoiser)
    pipe.vae.half()
    pipe.unet.half()
    # Else the folders that they were loaded from.
    pipe.vae.register_to_config(_name_or_path="emoji_sd/vae")
    pipe.unet.register_to_config(_name_or_path="emoji_sd/unet")
    pipe.save_pretrained(args.output)
    for name in ("vocab.json", "merges.txt"):  # transformers 4 reads these
        shutil.copy(args.text / "tokenizer" / name, args.output / "tokenizer" / name)
    size = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
