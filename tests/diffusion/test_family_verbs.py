"""Stable Diffusion XL and 3, FLUX and PixArt: what every verb does with them, and their LoRA files."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support.compare import same
from support.families import FAMILIES, FORGET, TARGET, copied, denoiser_of, erase, images, weights

import more_hf
from more_hf.core.views import experts_forced, routing_off


pytestmark = pytest.mark.usefixtures("short_prompts")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_restore_disabled_and_a_second_erasure(families, family):
    pipe, before = copied(families[family]), weights(families[family])
    erase(erase(pipe, tokens="subject"), "andy warhol", tokens="subject", router="hash")
    erasure = more_hf.get_erasure(pipe)
    assert erasure.concepts == [FORGET, "andy warhol"]
    assert (
        len([name for name in erasure.remap.prototypes.names if name.startswith((FORGET, "andy"))])
        == erasure.facts.rank
    )
    after = weights(pipe)
    erased = images(pipe, family, "a house by van gogh")
    with more_hf.disabled(pipe):
        assert same(denoiser_of(pipe), after)
        original = images(pipe, family, "a house by van gogh")
    assert torch.equal(original, images(families[family], family, "a house by van gogh"))
    assert not torch.allclose(original, erased, rtol=1e-3)
    assert same(denoiser_of(pipe), after)
    more_hf.restore(pipe)
    assert same(denoiser_of(pipe), before)
    assert not denoiser_of(pipe)._forward_pre_hooks


def with_expert(pipe, erasure, expert):
    """The original denoiser with W E_e in every site, written out in full."""
    pipe = copy.deepcopy(pipe)
    for name in erasure.sites:
        remap = erasure.remap_of(name)
        P = remap.prototypes.matrix
        E = torch.eye(len(P), dtype=P.dtype)
        for i, (forget, target) in enumerate(zip(remap.forget, remap.targets[expert].tolist(), strict=True)):
            E += torch.outer(P[:, target] - P[:, forget], remap.dual[remap.forget[i]])
        layer = denoiser_of(pipe).get_submodule(name)
        layer.weight.data[:, : len(P)] = (layer.weight[:, : len(P)].double() @ E).float()
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_routes_tokens_and_pooled_embedding_to_the_same_expert(families, family):
    pipe = erase(
        copied(families[family]), remap_to=[TARGET, "johannes vermeer"], router="random", retain=None
    )
    erasure = more_hf.get_erasure(pipe)
    wanted = [
        images(with_expert(families[family], erasure, expert), family, "a house by van gogh")
        for expert in (0, 1)
    ]
    apart = (wanted[0] - wanted[1]).norm()
    assert apart > 1e-4 * wanted[0].norm()
    for expert in (0, 1):
        with experts_forced(erasure, torch.tensor([expert])):
            assert (images(pipe, family, "a house by van gogh") - wanted[expert]).norm() < 0.01 * apart
    with more_hf.routing(pipe, seeds=[1]):
        first = images(pipe, family, "a house by van gogh")
    with more_hf.routing(pipe, seeds=[1]):
        assert torch.equal(images(pipe, family, "a house by van gogh"), first)


def test_positional_arguments_are_routed(families):
    pipe = erase(copied(families["sd3"]), remap_to=[TARGET, "johannes vermeer"], router="random")
    erasure = more_hf.get_erasure(pipe)
    latents, tokens, pooled, time = (
        torch.ones(1, 4, 8, 8),
        torch.ones(1, 5, 48),
        torch.ones(1, 40),
        torch.tensor([500.0]),
    )
    with torch.no_grad(), experts_forced(erasure, torch.tensor([1])):
        named = pipe.transformer(
            latents, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time
        ).sample
        assert torch.equal(pipe.transformer(latents, tokens, pooled, time).sample, named)
        with routing_off(erasure):
            unrouted = pipe.transformer(latents, tokens, pooled, time).sample
        assert not torch.allclose(unrouted, named, rtol=1e-4)


def assert_same_images(pipe, wanted, other, family, prompt="a house by van gogh"):
    """Up to the rounding of a run, in units of what the erasure changes."""
    wanted = images(wanted, family, prompt)
    apart = (wanted - images(other, family, prompt)).norm()
    assert apart > 1e-3 * wanted.norm()
    assert (images(pipe, family, prompt) - wanted).norm() < 0.01 * apart


@pytest.mark.parametrize(
    "family", ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdxl", "sd3", "flux"))]
)
def test_save_load_and_verify(families, family, tmp_path):
    pipe = erase(copied(families[family]), remap_to=[TARGET, "johannes vermeer"], router="hash", retain=None)
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True)
    assert more_hf.verify(folder).ok
    loaded = more_hf.load(folder)
    loaded.set_progress_bar_config(disable=True)
    erasure, again = more_hf.get_erasure(pipe), more_hf.get_erasure(loaded)
    assert again.to_dict() == erasure.to_dict() | {"base_revision": None}
    assert_same_images(loaded, pipe, families[family], family)
    assert more_hf.verify(
        more_hf.save(loaded, tmp_path / "again")
    ).ok  # nothing but the text encoders to find the prototypes with

    # each site is checked: the original's weight in its place does not pass
    part = next((folder / ("unet" if hasattr(pipe, "unet") else "transformer")).glob("*.safetensors"))
    state = load_file(part)
    name = f"{list(erasure.sites)[-1]}.weight"
    state[name] = weights(families[family])[name]
    save_file(state, part)
    assert not more_hf.verify(folder).ok
    with pytest.raises(more_hf.IncompatibleBaseError, match="fingerprint"):
        more_hf.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_save_pretrained_is_erased(families, erased_families, family, tmp_path):
    erased_families[family].save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert more_hf.get_erasure(loaded) is None
    assert_same_images(loaded, erased_families[family], families[family], family)


# LoRA


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "format"), [("sdxl", "peft"), ("sdxl", "kohya"), ("sd3", "peft"), ("flux", "peft")]
)
def test_lora_on_the_original_is_the_erased_pipeline(families, erased_families, family, format, tmp_path):
    pipe = copied(families[family])
    prompt = "a cat by van gogh"
    before, wanted = images(pipe, family, prompt), images(erased_families[family], family, prompt)
    file = more_hf.save_lora(erased_families[family], tmp_path, format=format, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    apart = (wanted - before).norm()
    assert apart > 1e-3 * before.norm()
    assert (images(pipe, family, prompt) - wanted).norm() < 0.01 * apart
    sites = more_hf.get_erasure(erased_families[family]).sites
    assert (
        len({len(value) for key, value in load_file(file).items() if "lora_A" in key or "lora_down" in key})
        == 1
    )  # one rank
    assert len(load_file(file)) == len(sites) * (3 if format == "kohya" else 2)

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state = weights(pipe)
    for name, value in weights(erased_families[family]).items():
        assert torch.allclose(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_experts_as_adapters(families, family):
    erased = erase(copied(families[family]), remap_to=[TARGET, "johannes vermeer"], retain=None)
    pipe, prompt = copied(families[family]), "a cat by van gogh"
    wanted = [
        images(with_expert(pipe, more_hf.get_erasure(erased), expert), family, prompt) for expert in (0, 1)
    ]
    for name, state_dict in more_hf.to_adapters(erased).items():
        pipe.load_lora_weights(state_dict, adapter_name=name)
    for expert in (0, 1):
        pipe.set_adapters(f"expert_{expert}")
        assert (images(pipe, family, prompt) - wanted[expert]).norm() < 0.01 * (wanted[0] - wanted[1]).norm()


@pytest.mark.slow
def test_kohya_keys_of_sdxl(erased_families, tmp_path):
    tensors = load_file(more_hf.save_lora(erased_families["sdxl"], tmp_path, format="kohya"))
    layers = [
        name
        for name, _ in erased_families["sdxl"].unet.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]
    names = [f"lora_unet_{name.replace('.', '_')}" for name in layers] + ["lora_unet_label_emb_0_0"]
    assert sorted(tensors) == sorted(
        f"{name}.{part}" for name in names for part in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    assert not tensors["lora_unet_label_emb_0_0.lora_down.weight"][
        :, 20:
    ].any()  # the columns of the time ids
    assert tensors["lora_unet_label_emb_0_0.lora_down.weight"].shape == (4, 20 + 6 * 4)


@pytest.mark.parametrize(
    ("family", "format", "said"),
    [
        ("sd3", "kohya", 'those of UNets.*Stable Diffusion 3.*Pass format="peft"'),
        ("flux", "kohya", 'those of UNets.*FLUX.*Pass format="peft"'),
        ("pixart", "peft", "loads no LoRA into a PixArtSigmaPipeline.*more_hf.save"),
        ("pixart", "kohya", "loads no LoRA into a PixArtSigmaPipeline"),
    ],
)
def test_lora_that_nothing_could_load_is_refused(erased_families, family, format, said, tmp_path):
    with pytest.raises(more_hf.ExportError, match=said):
        more_hf.save_lora(erased_families[family], tmp_path / "lora", format=format)
    assert list(tmp_path.iterdir()) == []
