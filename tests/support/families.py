"""
Every family at tiny size, one entry each in `TINY`: the real classes with random weights, 32x32 images and
features a few numbers wide; and, as literals, which layers read text and where a name's tokens are.
"""

import copy
import inspect
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ProcessorMixin,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

import more_hf
from support import language_models
from support.compare import state
from support.language_models import LLM_WIDTH
from support.pipelines import NOISE, TEXT_LENGTH, WORDS, build_tiny_sd, tiny_tokenizer


T5_LENGTH = 24  # of the prompts of these tests; `max_sequence_length` is an argument of every call
SYSTEM_LENGTH = 48  # with a system message in front
T5_WIDTH = 48
T5_SIZES = {"d_model": T5_WIDTH, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}


# Text encoders with their tokenizers, as parts of a pipeline


def t5_tokenizer():
    """Every printable character, and the words of the CLIP tokenizer."""
    words = [(f"▁{word}", -3.0) for word in WORDS.split()]
    characters = [(character, -9.0) for character in string.printable if not character.isspace()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0), *words, *characters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=T5_LENGTH)


def t5(number="", config=T5Config, encoder=T5EncoderModel):
    tokenizer = t5_tokenizer()
    model = encoder(config(vocab_size=len(tokenizer), **T5_SIZES, feed_forward_proj="gated-gelu"))
    return {f"text_encoder{number}": model.eval(), f"tokenizer{number}": tokenizer}


def umt5():
    return t5(config=UMT5Config, encoder=UMT5EncoderModel)


def clip(number, width, encoder=CLIPTextModelWithProjection, projection=None, positions=TEXT_LENGTH):
    tokenizer = tiny_tokenizer()
    if number:
        tokenizer.pad_token = "!"  # as Stable Diffusion XL's second one
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": positions, "projection_dim": projection or width}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **special)
    return {f"text_encoder{number}": encoder(config).eval(), f"tokenizer{number}": tokenizer}


def language_model(name, tokenizer, number="", **options):
    """One of `support.language_models`, by name."""
    words = tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer
    model = getattr(language_models, name)(words, **options)
    return {f"text_encoder{number}": model, f"tokenizer{number}": tokenizer}


def kandinsky_text():
    pooled = clip("_2", 20, CLIPTextModel, positions=77)
    return language_model("qwen_vl", language_models.qwen_processor()) | pooled


def hidream_text():
    words = language_model("llama", language_models.llama_tokenizer(), "_4")
    return clip("", 16) | clip("_2", 24) | t5("_3") | words


def hunyuan_text():
    letters = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    glyphs = {"text_encoder_2": T5EncoderModel(letters).eval(), "tokenizer_2": ByT5Tokenizer()}
    words = language_model("qwen_vl", language_models.qwen_tokenizer())
    return words | glyphs | {"guider": AdaptiveProjectedMixGuidance()}


# Autoencoders


def tiny_vae(cls=diffusers.AutoencoderKL, **options):
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        **{"sample_size": 32, "latent_channels": 4, **options},
    ).eval()


def plain_vae(**options):
    """Without the convolutions around the latents, which the newer models left out."""
    options = {"shift_factor": 0.1, **options}
    return tiny_vae(use_quant_conv=False, use_post_quant_conv=False, **options)


def flux_2_vae():
    return tiny_vae(diffusers.AutoencoderKLFlux2, layers_per_block=1)


SCALES = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
FILM_VAE = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, **SCALES}


def qwen_image_vae():
    return diffusers.AutoencoderKLQwenImage(**FILM_VAE, dim_mult=[1, 2], temperal_downsample=[False]).eval()


def wan_vae():
    return diffusers.AutoencoderKLWan(**FILM_VAE, dim_mult=[1, 1, 1, 1]).eval()


def hunyuan_vae():
    options = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32)}
    options |= {
        "layers_per_block": 1,
        "spatial_compression_ratio": 2,
        "sample_size": 32,
        "scaling_factor": 1.0,
    }
    return diffusers.AutoencoderKLHunyuanImage(**options).eval()


def sana_vae():
    blocks = {"block_types": "ResBlock", "block_out_channels": (8, 8), "qkv_multiscales": ((), ())}
    blocks["layers_per_block"] = (1, 1)
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    sides |= {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
    sides |= {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 1.0}
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides).eval()


# Denoisers


def stirred(model, loud=2.0):
    """
    The same model: no norm multiplies by 1, which would hide one that is left out, and the weights are large
    enough for the text to be seen in the picture.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=loud * module.in_features**-0.5)
        elif "RMSNorm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
    return model.eval()


LATENT = {"in_channels": 4, "out_channels": 4, "sample_size": 16}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}
FLUX = {**ONE_OF_EACH, **HEADS, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 8), "patch_size": 1}
FLUX |= {"in_channels": 16, "joint_attention_dim": T5_WIDTH}
FLUX_2 = {**ONE_OF_EACH, **HEADS, "axes_dims_rope": (2, 2, 2, 2), "in_channels": 16}
UNET = {"sample_size": 16, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
UNET |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
UNET |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
UNET |= {"attention_head_dim": 2, "use_linear_projection": True, "transformer_layers_per_block": (1, 2)}
UNET |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
TIME_IDS = 6 * 4  # numbers, behind the pooled text


def second_transformer(parts):
    """Wan 2.2: two transformers, one for the noisy steps and one for the others."""
    cls, config = type(parts["transformer"]), parts["transformer"].config
    return {"transformer_2": stirred(cls.from_config(config)), "boundary_ratio": 0.9}


# The layers of a UNet's blocks that read text, in front of `to_k` and `to_v`
SD_BLOCKS = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
SD_BLOCKS += [f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn2" for i in (0, 1)]
SD_BLOCKS += ["mid_block.attentions.0.transformer_blocks.0.attn2"]
SDXL_PLACES = ["down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
SDXL_PLACES += ["mid_block.attentions.0"]
SDXL_BLOCKS = [f"{place}.transformer_blocks.{i}.attn2" for place in SDXL_PLACES for i in (0, 1)]


def keys_and_values(blocks):
    return {f"{block}.{layer}": "tokens" for block in blocks for layer in ("to_k", "to_v")}


CONTEXT = {"context_embedder": "tokens"}
POOLED_CONTEXT = {**CONTEXT, "time_text_embed.text_embedder.linear_1": "pooled"}
POOLED = {"pooled": {"pooled": 0}}


@dataclass(frozen=True)
class Tiny:
    """A family at tiny size. `parts` are those besides denoiser, autoencoder and scheduler."""

    pipeline: str  # of text to image, in diffusers
    denoiser: str  # its class in diffusers; empty if it is among the parts
    config: Mapping[str, Any]  # the denoiser's
    parts: Callable[[], dict[str, Any]]
    sites: Mapping[str, str]  # every layer that reads text -> the space of what it reads
    # space -> where the token of a prompt that is a bare name is, what follows it, the padding that is read
    positions: Mapping[str, Mapping[str, int]]
    call: Mapping[str, Any] = field(default_factory=dict)  # what its call takes besides the prompt
    # of a bare name's prompt, with one position of padding: a mean over more is exact for no single one
    bare_length: int = T5_LENGTH
    vae: Callable[[], torch.nn.Module] = plain_vae
    scheduler: Callable[[], diffusers.SchedulerMixin] = diffusers.FlowMatchEulerDiscreteScheduler
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}  # other parts, from those so far
    attributes: Mapping[str, Any] = field(default_factory=dict)  # so that it draws small pictures
    # how large the denoiser's weights are; None leaves them as they are drawn
    loud: float | None = 2.0


SHORT = {"max_sequence_length": T5_LENGTH}
ANY_SIZE = {"use_resolution_binning": False}
CLIP_TOKENS = {"last": 1, "end": 2, "padding": 3}
SD = keys_and_values(SD_BLOCKS), {"tokens": CLIP_TOKENS}
SD_1 = Tiny("StableDiffusionPipeline", "", {}, lambda: build_tiny_sd("1").components, *SD)
# T5 has nothing in front, the template of Qwen3 `<|im_start|>user\n`, Qwen-Image and HunyuanImage drop what
# is in front, and FLUX.2 [dev] has a system message of 32 tokens there, Lumina 2 one of 26. Sana keeps the
# begin token of its instruction, whose last space joins the name; CogView4 pads in front to a multiple of 16;
# Kandinsky 5 drops 40 of the tokens, of which the real tokenizer makes fewer. Kolors pads in front, and all
# of its padding is alike. FLUX.2 [dev] has its padding in front, where nothing of the prompt was read yet.
TINY = {
    "sd-1": SD_1,
    "sd-2": replace(SD_1, parts=lambda: build_tiny_sd("2").components),
    "sdxl": Tiny(
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {**UNET, "cross_attention_dim": 16 + 24, "projection_class_embeddings_input_dim": 20 + TIME_IDS},
        lambda: clip("", 16, CLIPTextModel) | clip("_2", 24, projection=20) | {"add_watermarker": False},
        {**keys_and_values(SDXL_BLOCKS), "add_embedding.linear_1": "pooled"},
        {"tokens": CLIP_TOKENS, **POOLED},
        vae=tiny_vae,
        scheduler=lambda: diffusers.DDIMScheduler(**NOISE),
        loud=None,
    ),
    "sd3": Tiny(
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            **LATENT,
            **HEADS,
            "num_layers": 2,
            "patch_size": 2,
            "joint_attention_dim": T5_WIDTH,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16 + 24,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: clip("", 16) | clip("_2", 24) | t5("_3"),
        POOLED_CONTEXT,
        # CLIP's four positions are before T5's
        {"tokens": {"last": 1, "end": 2, "padding": 3, "T5 last": 4, "T5 end": 5, "T5 padding": 6}, **POOLED},
        SHORT,
        bare_length=3,
        loud=None,
    ),
    "flux": Tiny(
        "FluxPipeline",
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True},
        lambda: clip("", 32, CLIPTextModel) | t5("_2"),
        POOLED_CONTEXT,
        {"tokens": {"last": 0, "end": 1, "padding": 2}, **POOLED},
        SHORT,
        bare_length=3,
        loud=None,
    ),
    "pixart": Tiny(
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {
            **LATENT,
            **HEADS,
            "out_channels": 8,
            "num_layers": 2,
            "patch_size": 2,
            "cross_attention_dim": 16,
            "caption_channels": T5_WIDTH,
        },
        t5,
        {"caption_projection.linear_1": "tokens"},
        {"tokens": {"last": 0, "end": 1}},
        {**SHORT, **ANY_SIZE, "clean_caption": False},
        vae=tiny_vae,
        scheduler=lambda: diffusers.DDIMScheduler(**NOISE),
        loud=None,
    ),
    "chroma": Tiny(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        t5,
        CONTEXT,
        {"tokens": {"last": 0, "end": 1, "padding": 2}},
        SHORT,
        bare_length=3,
        loud=None,
    ),
    "wan": Tiny(
        "WanPipeline",
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": T5_WIDTH,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
        },
        umt5,
        {"condition_embedder.text_embedder.linear_1": "tokens"},
        {"tokens": {"last": 0, "end": 1}},
        {**SHORT, "num_frames": 1},
        vae=wan_vae,
    ),
    "z-image": Tiny(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": LLM_WIDTH,
            "axes_dims": [2, 2, 4],
            "axes_lens": [128, 32, 32],
        },
        lambda: language_model("qwen3", language_models.qwen_tokenizer()),
        {"cap_embedder.1": "tokens"},
        {"tokens": {"last": 3, "end": 4, **{f"end {i}": 3 + i for i in range(2, 6)}}},
        {**SHORT, "guidance_scale": 0.0},
    ),
    "qwen-image": Tiny(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": LLM_WIDTH,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: language_model("qwen_vl", language_models.qwen_tokenizer()),
        {"txt_in": "tokens"},
        {"tokens": {"last": 0, "end": 1, **{f"end {i}": i for i in range(2, 6)}}},
        vae=qwen_image_vae,
    ),
    "hunyuan-image": Tiny(
        "HunyuanImagePipeline",
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            **ONE_OF_EACH,
            "num_refiner_layers": 1,
            "text_embed_dim": LLM_WIDTH,
            "text_embed_2_dim": 32,
            "rope_axes_dim": (4, 4),
        },
        hunyuan_text,
        {
            "context_embedder.proj_in": "tokens",
            "context_embedder.time_text_embed.text_embedder.linear_1": "tokens",
        },
        {"tokens": {"last": 0, "end": 1}},
        vae=hunyuan_vae,
        attributes={"tokenizer_max_length": T5_LENGTH},
    ),
    "klein": Tiny(
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        {**FLUX_2, "joint_attention_dim": 3 * 24, "guidance_embeds": False},
        # Layers 9, 18 and 27 of the language model side by side, as in the real one
        lambda: {
            **language_model("qwen3", language_models.qwen_tokenizer(), width=24, layers=28),
            "is_distilled": True,
        },
        CONTEXT,
        {"tokens": {"last": 3, "end": 4, **{f"end {i}": 3 + i for i in range(2, 10)}, "padding": 13}},
        SHORT,
        bare_length=14,
        vae=flux_2_vae,
    ),
    "flux-2": Tiny(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        {**FLUX_2, "joint_attention_dim": 3 * 48, "guidance_embeds": True},
        # Layers 10, 20 and 30
        lambda: language_model("mistral", language_models.mistral_processor()),
        CONTEXT,
        {"tokens": {"last": 38, "end": 39}},
        {"max_sequence_length": SYSTEM_LENGTH},
        bare_length=40,
        vae=flux_2_vae,
    ),
    "sana": Tiny(
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            **LATENT,
            **HEADS,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": LLM_WIDTH,
        },
        lambda: language_model("gemma", language_models.gemma_tokenizer()),
        {"caption_projection.linear_1": "tokens"},
        {"tokens": {"last": 1}},
        {**SHORT, **ANY_SIZE},
        vae=sana_vae,
        loud=1.0,  # louder ones drown the text
    ),
    "lumina-2": Tiny(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 4,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (256, 32, 32),
            "cap_feat_dim": LLM_WIDTH,
        },
        lambda: language_model("gemma", language_models.gemma_tokenizer()),
        {"time_caption_embed.caption_embedder.1": "tokens"},
        {"tokens": {"last": 27}},
        bare_length=30,
    ),
    "cogview-4": Tiny(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        {
            **LATENT,
            **HEADS,
            "num_layers": 1,
            "text_embed_dim": LLM_WIDTH,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (32, 32),
        },
        lambda: language_model("glm", language_models.glm_tokenizer()),
        {"patch_embed.text_proj": "tokens"},
        {"tokens": {"last": 15}},
        SHORT,
        vae=tiny_vae,
    ),
    "kandinsky-5": Tiny(
        "Kandinsky5T2IPipeline",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": LLM_WIDTH,
            "in_text_dim2": 20,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 16,
            "ff_dim": 16,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (2, 2, 4),
        },
        kandinsky_text,
        {"text_embeddings.in_layer": "tokens", "pooled_text_embeddings.in_layer": "pooled"},
        {"tokens": {"last": 16, "end": 17}, **POOLED},
        bare_length=512,
        attributes={"resolutions": [(32, 32)]},
    ),
    "hidream": Tiny(
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [T5_WIDTH, LLM_WIDTH],
            "text_emb_dim": 16 + 24,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16),
            "llama_layers": [0, 2, 3, 3],
        },
        hidream_text,
        # T5 is read once. Of the layers 0 to 3 of its Llama the blocks read three, the last twice.
        {
            "caption_projection.4.linear": "tokens",
            "caption_projection.0.linear": "tokens of layer 0",
            "caption_projection.1.linear": "tokens of layer 2",
            "caption_projection.2.linear": "tokens of layer 3",
            "caption_projection.3.linear": "tokens of layer 3",
            "p_embedder.pooled_embedder.linear_1": "pooled",
        },
        # Llama has a begin token in front, and none behind
        {
            "tokens": {"last": 0, "end": 1, "padding": 2},
            **{f"tokens of layer {i}": {"last": 1, "padding": 2} for i in (0, 2, 3)},
            **POOLED,
        },
        SHORT,
        bare_length=3,
        attributes={"default_sample_size": 16},
        loud=1.0,  # louder ones overflow float16
    ),
    "auraflow": Tiny(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        {
            **HEADS,
            "sample_size": 16,
            "patch_size": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "caption_projection_dim": 16,
            "joint_attention_dim": T5_WIDTH,
            "pos_embed_max_size": 64,
        },
        umt5,
        CONTEXT,
        {"tokens": {"last": 0, "end": 1}},
        SHORT,
        vae=tiny_vae,
    ),
    # Stable Diffusion XL's UNet, which reads a language model through one projection
    "kolors": Tiny(
        "KolorsPipeline",
        "UNet2DConditionModel",
        {
            **UNET,
            "cross_attention_dim": 24,
            "encoder_hid_dim": LLM_WIDTH,
            "encoder_hid_dim_type": "text_proj",
            "projection_class_embeddings_input_dim": LLM_WIDTH + TIME_IDS,
        },
        lambda: language_model("chat_glm", language_models.chat_glm_tokenizer()),
        {"encoder_hid_proj": "tokens", "add_embedding.linear_1": "pooled"},
        {"tokens": {"last": T5_LENGTH - 1, "padding": 0}, **POOLED},
        SHORT,
        vae=tiny_vae,
        scheduler=lambda: diffusers.DDIMScheduler(**NOISE),
    ),
}
MATRIX = list(TINY)  # the families that the tests of `diffusion/test_families.py` run on
TINY["wan-2.2"] = replace(TINY["wan"], more=second_transformer)
# A family that the package does not know
UNKNOWN = Tiny(
    "CogView3PlusPipeline",
    "CogView3PlusTransformer2DModel",
    {
        **LATENT,
        **HEADS,
        "num_layers": 1,
        "text_embed_dim": T5_WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 16,
    },
    t5,
    {"patch_embed.text_proj": "tokens"},
    {},
    SHORT,
    vae=tiny_vae,
    scheduler=diffusers.CogVideoXDDIMScheduler,
)


def build(family=""):
    """The pipeline of a family, or of one that the package does not know. The global seed stays."""
    tiny = TINY[family] if family else UNKNOWN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = tiny.parts()
        if tiny.denoiser:
            denoiser = getattr(diffusers, tiny.denoiser)(**tiny.config).eval()
            if tiny.loud is not None:
                stirred(denoiser, tiny.loud)
            parts["unet" if tiny.denoiser.startswith("UNet") else "transformer"] = denoiser
            parts |= {"vae": tiny.vae(), "scheduler": tiny.scheduler()}
        parts |= tiny.more(parts)
    pipe = with_parts(getattr(diffusers, tiny.pipeline), parts)
    for name, value in tiny.attributes.items():
        setattr(pipe, name, value)
    return pipe


# Parts that a pipeline takes besides those of the text-to-image pipeline, and does without
OPTIONAL = ("image_encoder", "image_processor", "feature_extractor", "safety_checker", "guider", "processor")
OPTIONAL += ("siglip", "siglip_processor")


def with_parts(cls, parts):
    """A pipeline with these parts, as far as it takes them."""
    parts = {**dict.fromkeys(OPTIONAL), "requires_safety_checker": False, **parts}
    takes = inspect.signature(cls.__init__).parameters
    pipe = cls(**{name: part for name, part in parts.items() if name in takes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def copied(pipe):
    """A pipeline with a denoiser of its own; what no edit touches is shared, which is most of a copy."""
    twin = copy.copy(pipe)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    twin.register_modules(**{name: copy.deepcopy(getattr(pipe, name))})
    return twin


class Built(dict):
    """Pipelines, each made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, name):
        self[name] = self.make(name)
        return self[name]


def few_ordinary_prompts(monkeypatch):
    few = ("a dog and a tree", "a house by picasso", "a car")
    monkeypatch.setattr("more_hf.diffusion.ordinary.everyday_prompts", lambda tokenizer: few)


def set_length(monkeypatch, cls, length):
    """Let `encode_prompt` give a prompt so many positions by default, not 226 to 512."""
    encode = getattr(cls, "encode_prompt", None)
    if encode is not None and "max_sequence_length" in inspect.signature(encode).parameters:
        defaults = [p for p in inspect.signature(encode).parameters.values() if p.default is not p.empty]
        values = tuple(length if p.name == "max_sequence_length" else p.default for p in defaults)
        monkeypatch.setattr(encode, "__defaults__", values)


def shorten(monkeypatch, *classes):
    """Few ordinary prompts, and short ones for every family, or for these pipelines."""
    few_ordinary_prompts(monkeypatch)
    lengths = dict.fromkeys(classes, T5_LENGTH) or {
        getattr(diffusers, tiny.pipeline): tiny.call["max_sequence_length"]
        for tiny in TINY.values()
        if "max_sequence_length" in tiny.call
    }
    for cls, length in lengths.items():
        set_length(monkeypatch, cls, length)


FORGET, TARGET, RETAINED = "van gogh", "claude monet", "cat"


def erase(pipe, concepts=FORGET, **kwargs):
    return more_hf.erase_concept(
        pipe, concepts, **{"remap_to": TARGET, "retain": [RETAINED], "solver": "pinv", **kwargs}
    )


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def weights(pipe):
    return state(denoiser_of(pipe))


def images(pipe, family, prompt=None, **kwargs):
    generator, takes = torch.Generator().manual_seed(0), inspect.signature(pipe.__call__).parameters
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 1.0}
    options |= {"output_type": "np", **TINY[family].call, **kwargs}
    for name, value in TINY[family].attributes.items():
        setattr(pipe, name, value)
    options = {name: value for name, value in options.items() if name in takes}
    drawn = np.asarray(pipe(prompt=prompt, generator=generator, **options)[0])  # or a list, of layers
    return torch.from_numpy(drawn).double()


def with_expert(pipe, erasure, expert):
    """The original with W E_e in every site, written out in full."""
    twin = copied(pipe)
    for name in erasure.sites:
        remap = erasure.remap_of(name)
        P = remap.prototypes.matrix
        E = torch.eye(len(P), dtype=P.dtype)
        for i, (forget, target) in enumerate(zip(remap.forget, remap.targets[expert].tolist(), strict=True)):
            E += torch.outer(P[:, target] - P[:, forget], remap.dual[remap.forget[i]])
        reads_text = denoiser_of(twin).get_submodule(name).weight.data[:, : len(P)]
        reads_text.copy_((reads_text.double() @ E).float())
    return twin
