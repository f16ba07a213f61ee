"""A tiny FLUX, quantized by the libraries with which people run it."""

import dataclasses
from types import SimpleNamespace

import diffusers
import gguf
import pytest
import torch
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from optimum.quanto.library.extensions import cpp
from torchao.quantization import Int8WeightOnlyConfig
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from support import families
from support.families import SHORT, TINY, clip, plain_vae, t5_tokenizer


WIDTH = 64  # bitsandbytes packs a weight for the CPU in rows of 64
READERS = ["context_embedder", "time_text_embed.text_embedder.linear_1"]


def wide_text():
    tokenizer = t5_tokenizer()
    sizes = {**families.T5_SIZES, "d_model": WIDTH, "d_kv": 16, "d_ff": WIDTH}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes, feed_forward_proj="gated-gelu"))
    return clip("", WIDTH, CLIPTextModel) | {"text_encoder_2": encoder.eval(), "tokenizer_2": tokenizer}


WIDE = {**families.FLUX, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
WIDE |= dict.fromkeys(("in_channels", "joint_attention_dim", "pooled_projection_dim"), WIDTH)
WIDE |= {"guidance_embeds": True}


def build_wide_flux():
    """The tiny FLUX with every layer 64 numbers wide, which every library takes."""
    parts = {"parts": wide_text, "vae": lambda: plain_vae(latent_channels=WIDTH // 4)}
    wide = dataclasses.replace(TINY["flux"], config=WIDE, call=SHORT, **parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "flux", wide)
        return families.build("flux")


def torchao_config(skip=None):
    return diffusers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip)


def quanto_config(skip=None, dtype="int8"):
    return diffusers.QuantoConfig(weights_dtype=dtype, modules_to_not_convert=skip)


def bitsandbytes_4bit(skip=None):
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return diffusers.BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)


def bitsandbytes_8bit(skip=None):
    return diffusers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)


CONFIGS = {
    "torchao": torchao_config,
    "quanto": quanto_config,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
}


def bitsandbytes_on_the_cpu(patch):
    """Let diffusers load bitsandbytes' layers without a GPU, where they run too; no CPU packs them."""
    patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    for quantizer in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        patch.setattr(quantizer, "validate_environment", lambda self, *args, **kwargs: None)
        patch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


def quanto_without_compiler(patch):
    """Let quanto unpack 4 bits in Python: it would compile that for half a minute, once an environment."""

    def unpack(packed, bits):
        return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])

    patch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


def with_transformer(folder, transformer):
    pipe = diffusers.FluxPipeline.from_pretrained(folder, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def from_gguf(folder):
    """The pipeline with the transformer from a GGUF file in Q8_0."""
    path = folder / "transformer.gguf"
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
    writer = gguf.GGUFWriter(path, "flux")
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        if tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    options = {"config": str(folder), "subfolder": "transformer", "torch_dtype": torch.float32}
    options["quantization_config"] = config
    transformer = diffusers.FluxTransformer2DModel.from_single_file(str(path), **options)
    return with_transformer(folder, transformer)


def quantized(folder, scheme, skip=None):
    """The saved pipeline with its transformer quantized; float32 is the precision of what computes."""
    if scheme == "GGUF":
        return from_gguf(folder)
    if scheme == "layerwise casting":
        transformer = diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer")
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        return with_transformer(folder, transformer)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=CONFIGS[scheme](skip), torch_dtype=torch.float32
    )
    return with_transformer(folder, transformer)
