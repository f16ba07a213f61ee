"""Stable Diffusion 1.x and 2.x at tiny sizes, random weights, built in memory."""

import torch

import more_hf


WORDS = (
    "a in of style the by painting drawing photo picture art cat dog house tree car person van gogh vincent "
    "claude "
    "monet johannes vermeer kelly clarkson mckernan picasso pablo andy warhol"
)
TEXT_WIDTH = 32
TEXT_LENGTH = 48
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}

UNET = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": TEXT_WIDTH}
UNET |= {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
UNET |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
UNET |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
# One attention that reads text, so that tracing is quick.
ONE_ATTENTION = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
ONE_ATTENTION |= {"mid_block_type": None, "block_out_channels": (4,)}

FORGET = "van gogh"
TARGETS = ["claude monet", "johannes vermeer"]


def tiny_tokenizer():
    """Build a CLIP tokenizer in memory: every byte, and the words above as far as their merges agree."""
    from transformers import CLIPTokenizer

    # CLIP writes bytes as printable characters; the printable ones stand for themselves.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [f"{character}</w>" for character in characters]
    merges = []
    for word in WORDS.split():
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            merges.append((left, right))
            left += right
            tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=TEXT_LENGTH)


def build_tiny_sd(version: str = "1", seed: int = 0, **unet_options):
    """In the layout of SD 1.x or 2.x: random weights, 32x32 images. The global random state stays."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    layout = {"attention_head_dim": 2} if version == "1" else {"attention_head_dim": [1, 2]}
    layout |= {"use_linear_projection": version == "2"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                hidden_act="quick_gelu" if version == "1" else "gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(**{**UNET, **layout, **unet_options})
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=32,
        )
    if version == "1":
        scheduler = PNDMScheduler(skip_prk_steps=True, **NOISE)
    else:
        options = {"clip_sample": False, "set_alpha_to_one": False, **NOISE}
        scheduler = DDIMScheduler(prediction_type="v_prediction", **options)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def erase(pipe, concepts=FORGET, **options):
    """`erase_concept` with two targets."""
    return more_hf.erase_concept(pipe, concepts, **{"remap_to": TARGETS, **options})


def random_ip_adapter(unet, image_width=12, tokens=4):
    generator = torch.Generator().manual_seed(2)
    width = unet.config.cross_attention_dim
    shapes = {
        "proj.weight": (tokens * width, image_width),
        "proj.bias": (tokens * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    adapter, key = {}, 1
    for name in unet.attn_processors:
        if "attn2" in name:
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                adapter[f"{key}.{part}.weight"] = 0.3 * torch.randn(hidden, width, generator=generator)
            key += 2
    return {
        "image_proj": {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        "ip_adapter": adapter,
    }


def build_prompted_sd():
    """A tiny SD 1.x in which the prompt decides more than in most with random weights."""
    from diffusers import DDIMScheduler

    pipe = build_tiny_sd()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if name.endswith("attn2.to_v.weight"):
                weight *= 8
    return pipe
