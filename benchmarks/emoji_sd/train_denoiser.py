"""Train the UNet2DConditionModel (v-prediction) on cached latents and cached text.

    python train_denoiser.py --data DATA --vae VAE/vae --text TEXT --output DENOISER --minutes 90

VAE and text encoder are frozen, so each latent is computed once. With --others, a part of
each batch shows things that no caption names, under their artist's name alone: ten times as many pictures to
learn a style from, apart from the things that it is to be put on. Run it again to resume; the EMA is in
DENOISER/unet, the latents' scale in DENOISER/latents.json.
"""

import copy
import json
import random
from pathlib import Path

import torch
from dataset import draw_caption, load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from train_text import encode
from training import Trainer, add_arguments, batch_indices, compiled, generator, start
from transformers import CLIPTextModel, CLIPTokenizer

from more_hf_bench.script import argument_parser


NOISE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def build_unet(text_width: int, latent_channels: int, smoke: bool) -> UNet2DConditionModel:
    """
    Cross-attention in every block: 8 x 8 and 4 x 4 positions are few enough to let all of them read the text.
    """
    channels = (32, 32) if smoke else (128, 192)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=32,
    )


@torch.no_grad()
def cache_latents(vae: AutoencoderKL, data, index: torch.Tensor) -> torch.Tensor:
    """
    (n, 32, 8, 8): the posterior means, scaled to a deviation of one; the scale goes into the VAE's config.
    """
    latents = torch.cat([vae.encode(data.pixels(part)).latent_dist.mean for part in index.split(128)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return latents * vae.config.scaling_factor


def stratified_timesteps(count: int, draw: torch.Generator) -> torch.Tensor:
    """(count,) int64: one timestep from each of `count` equal slices of 0..999, which steadies the loss."""
    slices = torch.arange(count) + torch.rand(count, generator=draw)
    return (slices / count * NOISE["num_train_timesteps"]).long()[torch.randperm(count, generator=draw)]


def main() -> None:
    parser = argument_parser(__doc__)
    add_arguments(parser, steps=8000, batch_size=64, learning_rate=1e-3)
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained AutoencoderKL")
    parser.add_argument("--text", type=Path, required=True, help="folder that train_text.py wrote")
    parser.add_argument(
        "--others",
        type=float,
        default=0.0,
        help="the part of a batch that shows other things than the named ones",
    )
    parser.add_argument("--others_until", type=int, help="the step from which on only named things are shown")
    parser.add_argument(
        "--start", type=Path, help="a UNet folder of the same layout to start from instead of random weights"
    )
    args, accelerator = start(parser, smoke_steps=40, smoke_batch_size=8)
    device = accelerator.device

    data = load_dataset(args.data)
    named, others = (
        torch.nonzero(data.chosen & ~data.held_out).flatten(),
        torch.nonzero(~data.chosen).flatten(),
    )
    train = torch.cat([named, others])
    tokenizer = CLIPTokenizer.from_pretrained(args.text / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.text / "text_encoder").eval().to(device)
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    latents = cache_latents(vae, data, train)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "latents.json").write_text(json.dumps(dict(scaling_factor=vae.config.scaling_factor)))
    counts = f"{len(named)} images of named things, {len(others)} of others"
    print(f"{counts}, scale {vae.config.scaling_factor:.4f}", flush=True)

    unet = build_unet(encoder.config.hidden_size, latents.shape[1], args.smoke)
    if args.start is not None:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(args.start).float().state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        # Over 64 positions plain products beat the fused kernel's bf16 backward pass by a fifth.
        unet.set_attn_processor(AttnProcessor())
    trainer = Trainer(args, accelerator, unet, copy.deepcopy(unet), ("loss",), weight_decay=1e-2)
    model = compiled(unet, trainer.model)[0] if args.compile else trainer.model
    schedule = DDPMScheduler(**NOISE, clip_sample=False, prediction_type="v_prediction")
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    # Else the nearly clean steps rule the loss.
    weights = torch.minimum(snr + 1, torch.tensor(5.0)) / (snr + 1)

    while trainer.running():
        draw = generator(args.seed, trainer.step)
        rng = random.Random(f"{args.seed} {trainer.step}")
        early = args.others_until is None or trainer.step < args.others_until
        of_others = round(args.others * args.batch_size) if early else 0
        batch = torch.cat(
            [
                batch_indices(len(named), args.batch_size - of_others, trainer.step, args.seed),
                batch_indices(len(others), of_others, trainer.step, args.seed + 1) + len(named),
            ]
        )
        labels = zip(data.artist[train[batch]].tolist(), data.thing[train[batch]].tolist(), strict=True)
        ids = encode(tokenizer, [draw_caption(data, a, t, rng).text for a, t in labels])
        with torch.no_grad():
            text = encoder(ids.to(device))[0]  # (b, 40, width)
        clean = latents[batch]  # (b, 32, 8, 8)
        noise = torch.randn(clean.shape, generator=draw)
        t = stratified_timesteps(args.batch_size, draw)
        noisy = schedule.add_noise(clean, noise, t).to(device, memory_format=torch.channels_last)
        target = schedule.get_velocity(clean, noise, t).to(device)
        with accelerator.autocast():
            velocity = model(noisy, t.to(device), text).sample.float()
        errors = (velocity - target).square().mean((1, 2, 3))
        loss = (errors * weights[t].to(device)).mean()
        trainer.update(loss, loss=loss.item())

    trainer.save()
    trainer.ema.save_pretrained(args.output / "unet")


if __name__ == "__main__":
    main()
