"""The node for ComfyUI, in stand-ins for the few calls of a MODEL and a CLIP that it makes."""

import runpy
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.families import build

import more_hf
from more_hf.saving.single_file import original_layout


FILE = Path(__file__).parents[2] / "examples" / "comfyui" / "more_hf_node.py"
FORGET, TARGET = "gogh", "monet"
KEYS = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
Kept = namedtuple("Kept", "weight")


class Clip:
    """Tokens with their weights by encoder; the features of a prompt and its pooled one."""

    def __init__(self, pipe):
        self.pipe = pipe

    def tokenize(self, text):
        ids = self.pipe.tokenizer(text, padding="max_length").input_ids
        return {"l": [[(i, 1.0) for i in ids]]}

    def encode_from_tokens(self, tokens, return_pooled):
        assert return_pooled
        found = self.pipe.text_encoder(torch.tensor([[i for i, _ in tokens["l"][0]]]))
        return found.last_hidden_state, found.pooler_output


class Model:
    """A model that many patchers share, with the original of what is patched for the moment in `backup`."""

    def __init__(self, state):
        self.state, self.patches, self.backup = state, {}, {}
        self.model = SimpleNamespace(diffusion_model=torch.nn.Module())

    def model_state_dict(self, prefix):
        return {key: value for key, value in self.state.items() if key.startswith(prefix)}

    def clone(self):
        twin = Model(self.state)
        twin.patches, twin.backup = dict(self.patches), self.backup
        return twin

    def add_patches(self, patches, strength_patch=1.0):
        known = {key: patch for key, patch in patches.items() if key in self.state}
        self.patches |= {key: (strength_patch, patch) for key, patch in known.items()}
        return list(known)

    def weight(self, key):
        strength, (kind, (change,)) = self.patches[key]
        assert kind == "diff"
        return self.state[key] + strength * change


@pytest.fixture(scope="module")
def node():
    return runpy.run_path(str(FILE))


@pytest.fixture(scope="module")
def pipe():
    return build("sd-1")


@pytest.fixture
def model(pipe):
    layers = original_layout(pipe).items()
    return Model({key.removeprefix("model."): value for key, value in layers if "diffusion_model." in key})


def run(node, model, pipe, concepts=FORGET, remap_to=TARGET, strength=1.0):
    (patched,) = node["NODE_CLASS_MAPPINGS"]["MoreHFEraseConcept"]().erase(
        model, Clip(pipe), concepts, remap_to, strength
    )
    return patched


@torch.no_grad()
def means(node, pipe, name):
    """Of a name's last token, of the end token and of the padding, over the node's sentences; one a row."""
    kinds = [], [], []
    for template in node["TEMPLATES"]:
        ids = pipe.tokenizer(template.format(name), padding="max_length").input_ids
        end = ids.index(pipe.tokenizer.eos_token_id)
        z = pipe.text_encoder(torch.tensor([ids])).last_hidden_state[0]
        for rows, kind in zip(kinds, (z[end - 1 : end], z[end : end + 1], z[end + 1 :]), strict=True):
            rows.append(kind)
    return torch.stack([torch.cat(rows).mean(0) for rows in kinds])


def test_a_name_gives_what_its_target_gives(node, pipe, model):
    before = {key: value.clone() for key, value in model.state.items()}
    patched = run(node, model, pipe)
    assert patched is not model
    assert model.patches == {}
    assert all(torch.equal(model.state[key], value) for key, value in before.items())
    assert sorted(patched.patches) == sorted(
        key for key in before if ".attn2.to_k" in key or ".attn2.to_v" in key
    )
    for key in patched.patches:
        found, wanted = (
            means(node, pipe, FORGET) @ patched.weight(key).T,
            means(node, pipe, TARGET) @ before[key].T,
        )
        apart = (means(node, pipe, FORGET) @ before[key].T - wanted).norm()
        assert (found - wanted).norm() < 1e-3 * apart
        change = patched.weight(key) - before[key]
        begin = pipe.text_encoder(torch.tensor([[pipe.tokenizer.bos_token_id]])).last_hidden_state[0, 0]
        assert (change @ begin).norm() < 1e-3 * (before[key] @ begin).norm()


def test_without_a_target_nothing_is_left_and_strength_is_a_share(node, pipe, model):
    z = means(node, pipe, FORGET) @ run(node, model, pipe, remap_to="").weight(KEYS).T
    original = means(node, pipe, FORGET) @ model.state[KEYS].T
    assert z.norm() < 1e-3 * original.norm()
    half = means(node, pipe, FORGET) @ run(node, model, pipe, remap_to="", strength=0.5).weight(KEYS).T
    assert torch.allclose(half, original / 2, atol=1e-3 * original.norm())


def test_what_is_patched_for_the_moment_is_not_the_original(node, pipe, model):
    wanted = run(node, model, pipe).patches[KEYS][1][1][0]
    model.backup[KEYS] = Kept(model.state[KEYS])
    model.state[KEYS] = run(node, model, pipe).weight(KEYS)
    assert torch.equal(run(node, model, pipe).patches[KEYS][1][1][0], wanted)


def test_refuses_what_it_does_not_know(node, pipe, model):
    with pytest.raises(ValueError, match="more-hf lora"):
        run(node, Model({"diffusion_model.txt_in.input_embedder.weight": torch.ones(2, 2)}), pipe)
    model.state[KEYS] = model.state[KEYS].to(torch.uint8)
    with pytest.raises(ValueError, match=f"{KEYS} is quantized"):
        run(node, model, pipe)


def test_the_layers_are_those_that_a_lora_names(node, pipe, model, tmp_path):
    erased = more_hf.erase_concept(build("sd-1"), FORGET, remap_to=TARGET, tokens="last", solver="pinv")
    keys = load_file(more_hf.save_lora(erased, tmp_path, format="comfyui"))
    layers = {key.removesuffix("alpha") for key in keys if key.endswith("alpha")}
    assert {key.removesuffix("weight") for key in run(node, model, pipe).patches} == layers
