"""Tiny checkpoints under the names of the original projects, made by converting back."""

import re

import torch
from diffusers.loaders.single_file_utils import LDM_UNET_KEY

from more_hf.saving.original import original_tensors
from more_hf.saving.single_file import _renamed, unet_names
from support.families import denoiser_of


# diffusers' conversions of these ask for the tensors by name, and count the layers by such names
COUNTED = {
    "sd3": ("joint_blocks.0.x_block.attn2.", "joint_blocks.1.x_block.attn.ln_q"),
    "flux": ("double_blocks.0.", "single_blocks.0.", "guidance_in."),
    "chroma": ("double_blocks.0.", "single_blocks.0.", "distilled_guidance_layer.layers.0."),
    "sana": ("blocks.0.",),
    "auraflow": ("double_layers.0.", "single_layers.0."),
}
FLUX_2 = {
    "^x_embedder": "img_in",
    "^context_embedder": "txt_in",
    r"^time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
    r"^time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
    r"^time_guidance_embed\.guidance_embedder\.linear_1": "guidance_in.in_layer",
    r"^time_guidance_embed\.guidance_embedder\.linear_2": "guidance_in.out_layer",
    r"(modulation_?\w*)\.linear\.": r"\1.lin.",
    r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
    "^proj_out": "final_layer.linear",
    "^single_transformer_blocks": "single_blocks",
    r"attn\.to_qkv_mlp_proj": "linear1",
    r"attn\.to_out\.weight": "linear2.weight",
    r"^(single_blocks\.\d+)\.attn\.norm_q\.weight": r"\1.norm.query_norm.scale",
    r"^(single_blocks\.\d+)\.attn\.norm_k\.weight": r"\1.norm.key_norm.scale",
    "^transformer_blocks": "double_blocks",
    r"attn\.norm_q\.weight": "img_attn.norm.query_norm.scale",
    r"attn\.norm_k\.weight": "img_attn.norm.key_norm.scale",
    r"attn\.norm_added_q\.weight": "txt_attn.norm.query_norm.scale",
    r"attn\.norm_added_k\.weight": "txt_attn.norm.key_norm.scale",
    r"attn\.to_out\.0": "img_attn.proj",
    r"attn\.to_add_out": "txt_attn.proj",
    r"ff\.linear_in": "img_mlp.0",
    r"ff\.linear_out": "img_mlp.2",
    r"ff_context\.linear_in": "txt_mlp.0",
    r"ff_context\.linear_out": "txt_mlp.2",
    r"attn\.to_[qkv]\.": "img_attn.qkv.",
    r"attn\.add_[qkv]_proj\.": "txt_attn.qkv.",
}
Z_IMAGE = {
    r"all_final_layer\.2-1\.": "final_layer.",
    r"all_x_embedder\.2-1\.": "x_embedder.",
    r"attention\.to_out\.0": "attention.out",
    r"attention\.norm_([qk])": r"attention.\1_norm",
    r"attention\.to_[qkv]": "attention.qkv",
}
LUMINA_2 = {
    r"time_caption_embed\.caption_embedder": "cap_embedder",
    r"time_caption_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"time_caption_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
    r"norm_out\.linear_1": "final_layer.adaLN_modulation.1",
    r"norm_out\.linear_2": "final_layer.linear",
    r"norm1\.linear": "adaLN_modulation.1",
    r"\.norm1\.norm": ".attention_norm1",
    r"\.norm([12])\.": r".attention_norm\1.",
    r"attn\.to_out\.0": "attention.out",
    r"attn\.norm_([qk])": r"attention.\1_norm",
    r"attn\.to_[qkv]": "attention.qkv",
    r"feed_forward\.linear_": "feed_forward.w",
}
WAN = {
    r"condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"condition_embedder\.time_proj": "time_projection.1",
    "^scale_shift_table": "head.modulation",
    "scale_shift_table": "modulation",
    "proj_out": "head.head",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    r"to_out\.0": "o",
    r"to_([qkv])\.": r"\1.",
    r"ffn\.net\.0\.proj": "ffn.0",
    r"ffn\.net\.2": "ffn.2",
    r"\.norm2\.": ".norm!.",
    r"\.norm3\.": ".norm2.",
    r"\.norm!\.": ".norm3.",
}
PIXART = {r"caption_projection\.linear_": "y_embedder.y_proj.fc", "^transformer_blocks": "blocks"}
PIXART |= {r"attn2\.to_[kv]\.": "cross_attn.kv_linear."}
# tensors that an original file has and diffusers does not read
UNREAD = {"sana": {"pos_embed": torch.zeros(2), "y_embedder.y_embedding": torch.zeros(2)}}
RENAMED = {
    "flux-2": FLUX_2,
    "klein": FLUX_2,
    "z-image": Z_IMAGE,
    "lumina-2": LUMINA_2,
    "wan": WAN,
    "qwen-image": {},
    "hidream": {},
    "pixart": PIXART,
}


def original_of(pipe, family):
    """The denoiser's tensors, without a prefix."""
    denoiser = denoiser_of(pipe)
    if family in COUNTED:
        return original_tensors(denoiser, COUNTED[family]) | UNREAD.get(family, {})
    if family not in RENAMED:
        return _renamed(denoiser.state_dict(), unet_names(denoiser), LDM_UNET_KEY)
    joined = {}
    for name, tensor in denoiser.state_dict().items():
        if name.startswith("norm_out.linear.") and family in ("flux-2", "klein"):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        for pattern, place in RENAMED[family].items():
            name = re.sub(pattern, place, name)
        joined.setdefault(name, []).append(tensor)  # query, key and value are one matrix there
    return {name: torch.cat(tensors) for name, tensors in joined.items()}


def any_size(monkeypatch, family):
    """Let diffusers' conversions, which have the sizes of the real models in them, cut tiny ones."""
    split = torch.split
    heads = (2, 1, 1) if family == "lumina-2" else None

    def cut(tensor, sizes, dim=0):
        if isinstance(sizes, int) or not isinstance(tensor, torch.Tensor) or sum(sizes) == tensor.shape[dim]:
            return split(tensor, sizes, dim)
        shares = heads or sizes
        return split(tensor, [share * tensor.shape[dim] // sum(shares) for share in shares], dim)

    monkeypatch.setattr(torch, "split", cut)
