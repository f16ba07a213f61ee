"""A node for ComfyUI that erases concepts from a MODEL. Copy this file into `custom_nodes`."""

from itertools import takewhile

import torch

from more_hf.core.prototypes import PrototypeFitter
from more_hf.core.remap import Remap
from more_hf.core.request import names_in
from more_hf.diffusion.prompts import packaged_prompts


# Layers of ComfyUI's models that read the tokens of a prompt, and those that read its pooled feature
TOKENS = ("attn2.to_k", "attn2.to_v", "txt_in", "cap_embedder.1", "text_embedding.0", "cond_seq_linear")
TOKENS += ("y_embedder.y_proj.fc1",)
POOLED = ("label_emb.0.0", "vector_in.in_layer")
NORMS = {"cap_embedder.1": "cap_embedder.0", "txt_in": "txt_norm"}  # what the tokens go through before
SCALES = ("scale_weight", "weight_scale", "comfy_quant")  # beside a weight that is not stored as it is
TEMPLATES = (
    "{}",
    "a picture by {}",
    "an image of a tree by {}",
    "a house in the style of {}",
    "a photo of a {}",
)
KINDS = ("last", "end", "padding")  # positions: the name's last token, the first one behind it, all others


class EraseConcept:
    CATEGORY, FUNCTION, RETURN_TYPES = "advanced/model", "erase", ("MODEL",)
    DESCRIPTION = "Erase concepts from the layers that read the prompt. Place it behind the loader."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "concepts": ("STRING", {"default": "Van Gogh", "tooltip": "Names, with commas between"}),
                "remap_to": ("STRING", {"default": "", "tooltip": "What they become; empty for nothing"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05}),
            }
        }

    @torch.no_grad()
    def erase(self, model, clip, concepts, remap_to, strength):
        weights = weights_that_read_text(model)
        forget = [name.strip() for name in concepts.split(",") if name.strip()]
        remaps = fit(clip, norm_of(model, weights), forget, remap_to.strip() or None)
        patches = {}
        for key, weight in weights.items():
            remap = remaps["pooled" if is_one_of(POOLED, key) else "tokens"]
            width = len(remap.prototypes.matrix)  # behind the pooled text, a layer reads sizes of pictures
            change = torch.zeros(weight.shape)
            lora_A, lora_B = remap.delta(weight[:, :width].cpu())
            change[:, :width] = lora_B @ lora_A
            patches[key] = ("diff", (change,))
        patched = model.clone()
        if missed := patches.keys() - set(patched.add_patches(patches, strength)):
            raise ValueError(f"ComfyUI did not take the patches of {sorted(missed)}. Update this node.")
        return (patched,)


def weights_that_read_text(model):
    """By their keys, without the patches that other nodes, or this one, left on them for the moment."""
    state = model.model_state_dict("diffusion_model.")
    keys = [key for key in state if is_one_of(TOKENS + POOLED, key)]
    if not any(is_one_of(TOKENS, key) for key in keys):
        raise ValueError(
            "Which layers of this model read text is not known here. Use `more-hf lora` instead."
        )
    weights = {}
    for key in keys:
        weight = model.backup[key].weight if key in model.backup else state[key]
        if not weight.is_floating_point() or any(key.replace("weight", scale) in state for scale in SCALES):
            raise ValueError(f"{key} is quantized. Load a file that keeps this layer in 16 or 32 bits.")
        weights[key] = weight.detach().as_subclass(torch.Tensor)
    return weights


def is_one_of(layers, key):
    return key.endswith(tuple(f".{layer}.weight" for layer in layers))


def norm_of(model, weights):
    """The module that a prompt's features go through before the layers that read them."""
    modules = dict(model.model.diffusion_model.named_modules())
    for layer, norm in NORMS.items():
        if norm in modules and f"diffusion_model.{layer}.weight" in weights:
            return modules[norm]
    return torch.nn.Identity()


def fit(clip, norm, forget, target):
    """The edit of the tokens' features, and of the pooled one if there is one."""
    samples = {"tokens": [], "pooled": []}  # space -> prototype and features; those of no prototype make up Σ
    # 1. The begin token stays. Ordinary prompts are to move as little as possible.
    samples["tokens"].append(("begin", encode(clip, norm, "")[0][:1]))
    for prompt in packaged_prompts("everyday_prompts.txt"):
        if not any(names_in(prompt, name) for name in forget):
            features, pooled, last = encode(clip, norm, prompt)
            samples["tokens"].append((None, features[1 : last + 2]))
            samples["pooled"].append((None, pooled))
    # 2. A name's prototypes are its means over the templates, one for each kind of position.
    for name in [*forget, *([target] if target else [])]:
        for template in TEMPLATES:
            features, pooled, last = encode(clip, norm, template.format(name))
            for kind, rows in zip(KINDS, features.tensor_split([last + 1, last + 2]), strict=True):
                samples["tokens"].append((f"{name} {kind}", rows[-1:] if kind == "last" else rows))
            samples["pooled"].append((f"{name} pooled", pooled))
    # 3. Solve, with the kinds that this text encoder has: some pad with nothing, or with zeros.
    remaps = {}
    for space, found in samples.items():
        found = [(name, rows) for name, rows in found if rows is not None and rows.any()]
        if not found:
            continue
        names = list(dict.fromkeys(name for name, _ in found if name))
        fitter = PrototypeFitter(found[0][1].shape[-1], names, thin=True)
        for name, rows in found:
            if name is None:
                fitter.update_moment(rows)
            else:
                fitter.update(rows, torch.full((len(rows),), names.index(name)))
        kinds = [kind for kind in (*KINDS, "pooled") if f"{forget[0]} {kind}" in names]
        sent = {f"{name} {kind}": target and f"{target} {kind}" for name in forget for kind in kinds}
        remaps[space] = Remap.fit(fitter.prototypes, list(sent), [list(sent.values())], solver="covariance")
    return remaps


def encode(clip, norm, prompt):
    """The features `(positions, d)` and `(1, d')` or None of a prompt, and where its last own token is."""
    tokens = clip.tokenize(prompt)
    features, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    features = norm(features.to(next(norm.parameters(), features)))[0].float().cpu()
    # A prompt's own tokens stop where it starts to end like one with another word behind.
    ids, offset = token_ids(tokens, len(features))
    other, _ = token_ids(clip.tokenize(f"{prompt} ?"), len(features))
    pairs = zip(reversed(ids), reversed(other), strict=False)
    ending = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return features, None if pooled is None else pooled.float().cpu(), len(ids) - ending - 1 - offset


def token_ids(tokens, length):
    """The ids that made the features, up to the first of the padding; and how many in front made none."""
    streams = [[token[0] for token in chunks[0]] for chunks in tokens.values()]
    # several encoders have their features side by side, or one of them gives only the pooled one
    ids = min((ids for ids in streams if len(ids) >= length), key=len)
    offset = len(ids) - length
    while len(ids) > 1 and ids[-1] == ids[-2]:
        ids.pop()
    return ids, offset


NODE_CLASS_MAPPINGS = {"MoreHFEraseConcept": EraseConcept}
NODE_DISPLAY_NAME_MAPPINGS = {"MoreHFEraseConcept": "Erase Concept (more_hf)"}
