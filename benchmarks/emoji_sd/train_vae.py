"""Train the AutoencoderKL (64 x 64 x 3 <-> 8 x 8 x 32) on every rendered emoji but the held-out pairs.

    python train_vae.py --data DATA --output VAE --minutes 15

With --init it goes on from a trained VAE, and with --freeze_encoder it trains the decoder alone, so that a
denoiser trained on the latents stays valid: the last minutes of a run are well spent on a sharper decoder.
--moments_weight adds what L1 and LPIPS do not hold on to, thin lines and texture: mean and deviation over the
image of each AlexNet channel (the statistics of neural style transfer). --latent_noise makes the decoder draw
clean areas from latents that are off by a little, as a denoiser's are.

Half of each batch comes from the things that the denoiser learns, half from all 1,592: few images would be
learned by heart, and the chosen ones are those that must be sharp. Run it again to resume; the EMA is in
VAE/vae.
"""

import copy
from pathlib import Path

import lpips
import torch
from dataset import load_dataset
from diffusers import AutoencoderKL
from torch.nn.functional import interpolate
from training import Trainer, add_arguments, batch_indices, compiled, generator, start

from more_hf.data import load_lpips
from more_hf_bench.script import argument_parser


def build_vae(smoke: bool) -> AutoencoderKL:
    """No attention in the middle: at 8 x 8 the convolutions see enough, and it costs time."""
    channels = (8, 8, 8, 16) if smoke else (32, 32, 64, 96)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def perceptual_losses(
    model: torch.nn.Module, output: torch.Tensor, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    LPIPS and the distance of channel moments, both at 128 x 128.

    At 64 x 64, AlexNet's first stride is wider than a thin line.
    """

    def layers(x):
        x = interpolate(x, size=(128, 128), mode="bilinear", align_corners=False)
        return [layer.float() for layer in model.net(model.scaling_layer(x))]

    with torch.no_grad():
        wanted = layers(images)
    distance, moments = 0.0, 0.0
    for head, a, b in zip(model.lins, layers(output), wanted, strict=True):
        distance = distance + head((lpips.normalize_tensor(a) - lpips.normalize_tensor(b)).square()).mean()
        for moment in (torch.mean, torch.std):
            had, want = moment(a, (2, 3)), moment(b, (2, 3))
            moments = moments + (had - want).square().mean() / want.square().mean()
    return distance, moments


def main() -> None:
    parser = argument_parser(__doc__)
    add_arguments(parser, steps=3000, batch_size=16, learning_rate=2e-3)
    parser.add_argument("--lpips_weight", type=float, default=0.5, help="of LPIPS; L1 has weight 1")
    parser.add_argument("--moments_weight", type=float, default=0.0)
    parser.add_argument(
        "--latent_noise",
        type=float,
        default=0.0,
        help="up to this much more noise, in deviations of the latents",
    )
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="of the KL divergence a latent number")
    parser.add_argument("--init", type=Path, help="folder of an AutoencoderKL to start from")
    parser.add_argument("--freeze_encoder", action="store_true", help="train the decoder alone")
    args, accelerator = start(parser, smoke_steps=40, smoke_batch_size=8)

    data = load_dataset(args.data)
    everything = torch.nonzero(~data.held_out).flatten()  # held-out pairs are new to the VAE too
    chosen = torch.nonzero(data.chosen & ~data.held_out).flatten()
    vae = (
        AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32)
        if args.init
        else build_vae(args.smoke)
    )
    vae = vae.train().to(memory_format=torch.channels_last)
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    perceptual = load_lpips().to(accelerator.device)
    trainer = Trainer(args, accelerator, vae, copy.deepcopy(vae), ("l1", "lpips", "moments", "kl"))
    encode, decode, losses = vae.encode, vae.decode, perceptual_losses
    if args.compile:
        encode, decode, losses = compiled(vae, encode, decode, losses)

    half = args.batch_size // 2
    while trainer.running():
        draw = generator(args.seed, trainer.step)
        picked = torch.cat(
            [
                everything[batch_indices(len(everything), half, trainer.step, args.seed)],
                chosen[batch_indices(len(chosen), half, trainer.step, args.seed + 1)],
            ]
        )
        images = data.pixels(picked)  # (b, 3, 64, 64) in [-1, 1]
        flip = torch.rand(len(images), generator=draw) < 0.5
        images[flip] = images[flip].flip(-1)
        images = images.to(accelerator.device, memory_format=torch.channels_last)
        noise = torch.randn(len(images), vae.config.latent_channels, 8, 8, generator=draw).to(
            accelerator.device
        )
        further = args.latent_noise * torch.rand(len(images), 1, 1, 1, generator=draw).to(accelerator.device)
        with accelerator.autocast():
            posterior = encode(images).latent_dist
            latents = posterior.mean + (posterior.std + further * posterior.mean.std()) * noise
            output = decode(latents).sample.float()
            distance, moments = losses(perceptual, output, images)
        l1 = (output - images).abs().mean()
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = l1 + args.lpips_weight * distance + args.moments_weight * moments + args.kl_weight * kl
        trainer.update(loss, l1=l1.item(), lpips=distance.item(), moments=moments.item(), kl=kl.item())

    trainer.save()
    trainer.ema.save_pretrained(args.output / "vae")


if __name__ == "__main__":
    main()
