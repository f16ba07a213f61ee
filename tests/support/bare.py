"""
The newer families with prompts that are a bare name: where its tokens are, and how to erase and draw it.
"""

import torch

import more_hf
from support.families import SHORTENED, T5_LENGTH, denoiser_of, images, shorten


FORGET, TARGET, OTHER = "gogh", "monet", "cat"  # one token each in every tokenizer here
SITES = {
    "chroma": ["context_embedder"],
    "wan": ["condition_embedder.text_embedder.linear_1"],
    "z-image": ["cap_embedder.1"],
    "qwen-image": ["txt_in"],
    "hunyuan-image": [
        "context_embedder.proj_in",
        "context_embedder.time_text_embed.text_embedder.linear_1",
    ],
    "klein": ["context_embedder"],
    "flux-2": ["context_embedder"],
    "sana": ["caption_projection.linear_1"],
    "lumina-2": ["time_caption_embed.caption_embedder.1"],
    "cogview-4": ["patch_embed.text_proj"],
    "auraflow": ["context_embedder"],
    "kandinsky-5": ["text_embeddings.in_layer", "pooled_text_embeddings.in_layer"],
    "kolors": ["encoder_hid_proj", "add_embedding.linear_1"],
    "hidream": [
        "caption_projection.4.linear",
        "caption_projection.0.linear",
        "caption_projection.1.linear",
        "caption_projection.2.linear",
        "caption_projection.3.linear",
        "p_embedder.pooled_embedder.linear_1",
    ],
}
# Where the bare name's token is, what follows it, and the padding that is read: T5 has nothing in front, the
# template of Qwen3 `<|im_start|>user\n`, Qwen-Image and HunyuanImage drop what is in front, and FLUX.2 [dev]
# has a system message of 32 tokens there, Lumina 2 one of 26. Sana keeps the begin token of its instruction,
# whose last space joins the name; CogView4 pads in front to a multiple of 16; Kandinsky 5 drops 40 of the
# tokens, of which the real tokenizer makes fewer. Kolors pads in front, and all of its padding is alike.
POSITIONS = {
    "chroma": {"last": 0, "end": 1, "padding": 2},
    "wan": {"last": 0, "end": 1},
    "z-image": {"last": 3, "end": 4, "end 2": 5, "end 3": 6, "end 4": 7, "end 5": 8},
    "qwen-image": {"last": 0, "end": 1, "end 2": 2, "end 3": 3, "end 4": 4, "end 5": 5},
    "hunyuan-image": {"last": 0, "end": 1},
    "klein": {"last": 3, "end": 4, **{f"end {i}": 3 + i for i in range(2, 10)}, "padding": 13},
    "flux-2": {"last": 38, "end": 39},
    "sana": {"last": 1},
    "lumina-2": {"last": 27},
    "cogview-4": {"last": 15},
    "auraflow": {"last": 0, "end": 1},
    "kandinsky-5": {"last": 16, "end": 17},
    "kolors": {"last": T5_LENGTH - 1, "padding": 0},
    "hidream": {"last": 0, "end": 1, "padding": 2},
}
# One position of padding behind the prompt: a mean over more is exact for no single one. FLUX.2 [dev] has its
# padding in front, where nothing of the prompt was read yet. HiDream's T5 and Llama have one each.
LENGTH = {"klein": 14, "chroma": 3, "flux-2": 40, "lumina-2": 30, "kandinsky-5": 512, "hidream": 3}


def use_bare_names(monkeypatch, family, *classes):
    """Prototypes of the bare name alone, so that a prompt that is the name holds nothing else."""
    shorten(monkeypatch, *SHORTENED, *classes, length=LENGTH.get(family, T5_LENGTH))
    monkeypatch.setattr("more_hf.diffusion.plan.TEMPLATES", ("{}",))
    monkeypatch.setitem(more_hf.diffusion.encoder.TOKENS, "positions", ("last", "end", "padding"))


def erase(pipe, **kwargs):
    return more_hf.erase_concept(pipe, FORGET, **{"remap_to": TARGET, "solver": "pinv", **kwargs})


def draw(pipe, family, prompt, **kwargs):
    prompt = list(prompt) if isinstance(prompt, list) else prompt  # into which Z-Image writes
    options = {"max_sequence_length": LENGTH.get(family, T5_LENGTH), **kwargs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some pipelines draw from the global state, too
        return images(pipe, family, prompt, **options)


@torch.no_grad()
def read_by_layer(pipe, family, prompt, **kwargs):
    """What the first layer that reads text is given while the pipeline draws, `(tokens, d)`."""
    seen = []
    layer = denoiser_of(pipe).get_submodule(SITES[family][0])
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    draw(pipe, family, prompt, **kwargs)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])
