"""Stable Diffusion XL and 3, FLUX and PixArt: which layers are edited, what is exact there, and what every verb does with them."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload
from conftest import build_tiny_sd
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import BUILDERS, T5_LENGTH, build, embeds, shorten

import more_hf


FORGET, TARGET, RETAINED = "van gogh", "claude monet", "cat"
EDITED_IN_UNET = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.1.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.1.attn2.to_v",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_k",
    "up_blocks.0.attentions.0.transformer_blocks.1.attn2.to_v",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k",
    "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_v",
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_k",
    "up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_v",
]
TOKEN_SITES = {
    "sdxl": EDITED_IN_UNET,
    "sd3": ["context_embedder"],
    "flux": ["context_embedder"],
    "pixart": ["caption_projection.linear_1"],
}
POOLED_SITE = {
    "sdxl": "add_embedding.linear_1",
    "sd3": "time_text_embed.text_embedder.linear_1",
    "flux": "time_text_embed.text_embedder.linear_1",
}
FAMILIES = list(BUILDERS)
WITH_POOLED = list(POOLED_SITE)
CALL = {
    "sdxl": {},
    "sd3": {"max_sequence_length": T5_LENGTH},
    "flux": {"max_sequence_length": T5_LENGTH},
    "pixart": {"max_sequence_length": T5_LENGTH, "use_resolution_binning": False, "clean_caption": False},
}


@pytest.fixture(scope="module", autouse=True)
def short_prompts():
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def originals():
    """Pipelines by family. Not to be modified."""
    return {family: build(family) for family in FAMILIES}


def erase(pipe, concepts=FORGET, **kwargs):
    return more_hf.erase_concept(pipe, concepts, **{"remap_to": TARGET, "retain": [RETAINED], "solver": "pinv", **kwargs})


@pytest.fixture(scope="module")
def erased(originals):
    """The same, erased. Not to be modified."""
    return {family: erase(copy.deepcopy(pipe)) for family, pipe in originals.items()}


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def weights(pipe):
    return {name: value.clone() for name, value in denoiser_of(pipe).state_dict().items()}


def images(pipe, family, prompt=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 1.0, "output_type": "np", **CALL[family]}
    return torch.from_numpy(pipe(prompt, generator=generator, **{**options, **kwargs}).images).double()


def spaces(pipe):
    """Space -> the factors."""
    erasure = more_hf.get_erasure(pipe)
    return {site.space: erasure.remap_of(name) for name, site in erasure.sites.items()}


# What is edited, and that it is exact


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_exactly_the_layers_that_read_text(originals, erased, family):
    sites = [*TOKEN_SITES[family], *([POOLED_SITE[family]] if family in POOLED_SITE else [])]
    before, after = weights(originals[family]), weights(erased[family])
    assert sorted(name for name in after if not torch.equal(after[name], before[name])) == sorted(f"{name}.weight" for name in sites)
    assert sorted(more_hf.get_erasure(erased[family]).sites) == sorted(sites)


def test_the_columns_of_the_time_ids_stay(originals, erased):
    before, after = weights(originals["sdxl"])["add_embedding.linear_1.weight"], weights(erased["sdxl"])["add_embedding.linear_1.weight"]
    assert before.shape == (16, 20 + 6 * 4)
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert (before[:, :20] != after[:, :20]).any(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_of_the_forget_prompt_is_the_targets_at_every_site(originals, erased, family):
    before, after = weights(originals[family]), weights(erased[family])
    erasure = more_hf.get_erasure(erased[family])
    for name in erasure.sites:
        P = erasure.remap_of(name).prototypes
        old, new = (state[f"{name}.weight"][:, : len(P.matrix)].double() for state in (before, after))
        forget = [column for column in P.names if column.startswith(FORGET)]
        assert forget
        for column in P.names:
            if column in forget:
                target = P[column.replace(FORGET, TARGET)]
                assert (old @ P[column] - old @ target).norm() > 1e-3 * (old @ target).norm()
                assert (new @ P[column] - old @ target).norm() < 1e-3 * (old @ P[column] - old @ target).norm()
            else:  # the target, the retained name, the begin token and the empty prompt
                assert (new @ P[column] - old @ P[column]).norm() < 1e-4 * (old @ P[column]).norm()


def reference_features(pipe, family, prompt):
    """Token and pooled features by calling the text encoders themselves."""

    def clip(number, key):
        tokenizer, encoder = (getattr(pipe, part + number) for part in ("tokenizer", "text_encoder"))
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        out = encoder(ids, output_hidden_states=True)
        return out.hidden_states[-2], out[key]

    def t5(number):
        ids = getattr(pipe, "tokenizer" + number)(prompt, padding="max_length", max_length=T5_LENGTH, return_tensors="pt")
        mask = ids.attention_mask if family == "pixart" else None
        return getattr(pipe, "text_encoder" + number)(ids.input_ids, attention_mask=mask)[0]

    if family == "sdxl":
        (one, _), (two, pooled) = clip("", "last_hidden_state"), clip("_2", "text_embeds")
        return torch.cat([one, two], -1), pooled
    if family == "sd3":
        (one, pooled_one), (two, pooled_two) = clip("", "text_embeds"), clip("_2", "text_embeds")
        last = t5("_3")
        joined = torch.cat([one, two], -1)
        padded = torch.nn.functional.pad(joined, (0, last.shape[-1] - joined.shape[-1]))
        return torch.cat([padded, last], 1), torch.cat([pooled_one, pooled_two], -1)
    return (t5("_2"), clip("", "pooler_output")[1]) if family == "flux" else (t5(""), None)


# Where the bare name's last token, the end token and the padding are: [CLS] van gogh [END] ..., and two tokens and </s> in T5.
POSITIONS = {
    "sdxl": {"last": (2, 3), "end": (3, 4), "padding": (4, 48)},
    "sd3": {"last": (2, 3), "end": (3, 4), "T5 last": (49, 50), "T5 end": (50, 51), "T5 padding": (51, 72)},
    "flux": {"last": (1, 2), "end": (2, 3), "padding": (3, 24)},
    "pixart": {"last": (1, 2), "end": (2, 3)},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prototypes_are_the_features_that_the_denoiser_reads(originals, monkeypatch, family):
    monkeypatch.setattr("more_hf.diffusion.concepts.TEMPLATES", ("{}",))
    monkeypatch.setitem(more_hf.diffusion.concepts.TOKENS, "positions", ("last", "end", "padding"))  # nothing is after a bare name
    erased = erase(copy.deepcopy(originals[family]), retain=None)
    tokens, pooled = reference_features(originals[family], family, FORGET)
    remaps = spaces(erased)
    for kind, (start, stop) in POSITIONS[family].items():
        wanted = tokens[0, start:stop].mean(0).double()
        assert torch.allclose(remaps["tokens"].prototypes[f"{FORGET} · {kind}"], wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(remaps["tokens"].prototypes[f"{TARGET} · {kind}"], wanted, rtol=1e-4, atol=1e-5)
    kinds = {name.split(" · ")[1] for name in remaps["tokens"].prototypes.names if " · " in name}
    assert kinds == set(POSITIONS[family]) | ({"padding"} if family == "sd3" else set())
    assert (pooled is None) == ("pooled" not in remaps)
    if pooled is not None:
        assert torch.allclose(remaps["pooled"].prototypes[f"{FORGET} · pooled"], pooled[0].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_move_for_the_forgotten_prompt_only(originals, erased, family):
    remaps = spaces(erased[family])
    prompts = {name: embeds(remaps, name, masked=family == "pixart") for name in (FORGET, TARGET, RETAINED)}
    before = {name: images(originals[family], family, **prompt) for name, prompt in prompts.items()}
    after = {name: images(erased[family], family, **prompt) for name, prompt in prompts.items()}
    apart = (before[FORGET] - before[TARGET]).norm()
    assert apart > 1e-3 * before[FORGET].norm()
    assert (after[FORGET] - before[FORGET]).norm() > 0.99 * apart
    for name, wanted in ((FORGET, TARGET), (TARGET, TARGET), (RETAINED, RETAINED)):
        assert (after[name] - before[wanted]).norm() < 0.01 * apart


@pytest.mark.parametrize("family", FAMILIES)
def test_guarantees_and_proof_cover_every_space(erased, family):
    erasure = more_hf.get_erasure(erased[family])
    keys = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")
    for prefix in ("", "pooled_") if family in POOLED_SITE else ("",):
        assert all(erasure.guarantees[prefix + key] < 1e-8 for key in keys)
    assert erasure.proof["forget_vs_target"] < 1e-3
    assert erasure.proof["target_changed"] < 1e-3
    assert erasure.proof["forget_changed"] > 0.9
    assert any("`clip_skip`" in leak for leak in erasure.facts["leaks"]) == (family in ("sdxl", "sd3"))
    assert any("upper from lower case" in leak for leak in erasure.facts["leaks"]) == (family in ("sd3", "flux"))
    assert not any("pooled" in leak for leak in erasure.facts["leaks"])


def test_every_space_has_its_own_solver(originals):
    pipe = erase(copy.deepcopy(originals["flux"]), solver="auto")
    tokens, pooled = more_hf.get_erasure(pipe).facts["solver_reason"].split("; pooled: ")
    assert "in 48 dimensions" in tokens
    assert "in 32 dimensions" in pooled
    for reason in (tokens, pooled):
        assert all(re.search(rf"{solver} [\d.]+ %", reason) for solver in ("pinv", "covariance"))
    remaps = spaces(pipe)
    assert pooled.startswith(remaps["pooled"].solver)
    assert more_hf.get_erasure(pipe).facts["solver"] == remaps["tokens"].solver


@pytest.mark.parametrize("site", ["tokens", "pooled"])
@pytest.mark.parametrize("family", WITH_POOLED)
@pytest.mark.parametrize("router", [None, "random"])
def test_the_proof_sees_a_missed_layer_on_either_path(originals, family, site, router):
    pipe = copy.deepcopy(originals[family])
    name = POOLED_SITE[family] if site == "pooled" else TOKEN_SITES[family][-1]
    layer = denoiser_of(pipe).get_submodule(name)
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: torch.nn.functional.linear(x, weight, layer.bias)
    before = weights(pipe)
    with pytest.raises(more_hf.TargetNotFoundError, match="proof by run failed .* rolled back"):
        erase(pipe, router=router)
    after = weights(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not denoiser_of(pipe)._forward_pre_hooks


@pytest.mark.parametrize("family", WITH_POOLED)
def test_without_the_pooled_path(originals, erased, family):
    before, pipe = weights(originals[family]), erase(copy.deepcopy(originals[family]), pooled=False)
    name = POOLED_SITE[family]
    assert torch.equal(weights(pipe)[f"{name}.weight"], before[f"{name}.weight"])
    assert sorted(more_hf.get_erasure(pipe).sites) == sorted(TOKEN_SITES[family])
    leak = f"the pooled prompt embedding was left as it is: what it says of the concept still enters through `{name}`"
    assert leak in str(more_hf.get_erasure(pipe))
    assert "pooled_rank" not in more_hf.get_erasure(pipe).guarantees

    # the image of the forgotten prompt still has what the pooled embedding says, and only that
    remaps = spaces(erased[family])
    forget, target = (embeds(remaps, name) for name in (FORGET, TARGET))
    left = images(originals[family], family, **{**target, "pooled_prompt_embeds": forget["pooled_prompt_embeds"]})
    gone = images(originals[family], family, **target)
    found = images(pipe, family, **forget)
    assert (left - gone).norm() > 1e-3 * gone.norm()
    assert (found - left).norm() < 0.01 * (left - gone).norm()

    erase(pipe, "andy warhol")  # a refit edits it too
    assert not torch.equal(weights(pipe)[f"{name}.weight"], before[f"{name}.weight"])
    after = weights(more_hf.restore(pipe))
    assert all(torch.equal(after[name], before[name]) for name in before)


# Stable Diffusion 1.x reads the last layer, 2.x the last of an encoder that ships without its last layer, not the one before it.
@pytest.mark.parametrize("version", ["1", "2"])
@torch.no_grad()
def test_prototypes_of_sd_are_of_the_layer_that_encode_prompt_reads(version):
    pipe = build_tiny_sd(version)
    encoded = pipe.text_encoder(torch.tensor([pipe.tokenizer(FORGET).input_ids]), output_hidden_states=True)
    remap = more_hf.get_erasure(erase(pipe, tokens="last", retain=None)).remap
    found = remap.prototypes[f"{FORGET} · bare last"]
    assert torch.allclose(found, encoded.last_hidden_state[0, 2].double(), rtol=1e-4, atol=1e-5)
    assert (found - encoded.hidden_states[-2][0, 2]).norm() > 0.1 * found.norm()


def test_columns_under_sequential_offload(originals, erased):
    pipe = copy.deepcopy(originals["sdxl"])
    before, wanted = weights(originals["sdxl"]), weights(erased["sdxl"])
    cpu_offload(pipe.unet, torch.device("cpu"))
    held = pipe.unet.add_embedding.linear_1._hf_hook.weights_map
    erase(pipe)
    assert pipe.unet.add_embedding.linear_1.weight.is_meta
    assert torch.equal(held["weight"], wanted["add_embedding.linear_1.weight"])
    more_hf.restore(pipe)
    assert torch.equal(held["weight"], before["add_embedding.linear_1.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(originals, family, dtype):
    pipe = copy.deepcopy(originals[family]).to(dtype)
    before = weights(pipe)
    erase(pipe)
    erasure = more_hf.get_erasure(pipe)
    for name, original in erasure.originals.items():
        site = denoiser_of(pipe).get_submodule(name).weight[:, : original.shape[1]]
        remap = erasure.remap_of(name)
        exact = original.double() + original.double() @ remap.shift() @ remap.D_F
        assert site.dtype == dtype
        assert torch.equal(site, exact.to(dtype))
    more_hf.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())


# Every verb


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_disabled_and_a_second_erasure(originals, family):
    pipe, before = copy.deepcopy(originals[family]), weights(originals[family])
    erase(erase(pipe, tokens="subject"), "andy warhol", tokens="subject", router="hash")
    erasure = more_hf.get_erasure(pipe)
    assert erasure.concepts == [FORGET, "andy warhol"]
    assert len([name for name in erasure.remap.prototypes.names if name.startswith((FORGET, "andy"))]) == erasure.facts["rank"]
    after = weights(pipe)
    with more_hf.disabled(pipe):
        assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
    assert all(torch.equal(value, after[name]) for name, value in weights(pipe).items())
    more_hf.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in weights(pipe).items())
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_routes_tokens_and_pooled_embedding_to_the_same_expert(originals, family):
    pipe = erase(copy.deepcopy(originals[family]), remap_to=[TARGET, "johannes vermeer"], router="random", retain=None)
    erasure = more_hf.get_erasure(pipe)
    wanted = [images(with_expert(originals[family], erasure, expert), family, "a house by van gogh") for expert in (0, 1)]
    apart = (wanted[0] - wanted[1]).norm()
    assert apart > 1e-4 * wanted[0].norm()
    for expert in (0, 1):
        erasure.hook.forced = torch.tensor([expert])
        assert (images(pipe, family, "a house by van gogh") - wanted[expert]).norm() < 0.01 * apart
    erasure.hook.forced = None
    with more_hf.routing(pipe, seeds=[1]):
        first = images(pipe, family, "a house by van gogh")
    with more_hf.routing(pipe, seeds=[1]):
        assert torch.equal(images(pipe, family, "a house by van gogh"), first)


def test_positional_arguments_are_routed(originals):
    pipe = erase(copy.deepcopy(originals["sd3"]), remap_to=[TARGET, "johannes vermeer"], router="random")
    more_hf.get_erasure(pipe).hook.forced = torch.tensor([1])
    latents, tokens, pooled, time = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 48), torch.ones(1, 40), torch.tensor([500.0])
    with torch.no_grad():
        named = pipe.transformer(latents, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=time).sample
        assert torch.equal(pipe.transformer(latents, tokens, pooled, time).sample, named)
        more_hf.get_erasure(pipe).hook.enabled = False
        assert not torch.allclose(pipe.transformer(latents, tokens, pooled, time).sample, named, rtol=1e-4)


def assert_same_images(pipe, wanted, other, family, prompt="a house by van gogh"):
    """Up to the rounding of a run, in units of what the erasure changes."""
    wanted = images(wanted, family, prompt)
    apart = (wanted - images(other, family, prompt)).norm()
    assert apart > 1e-3 * wanted.norm()
    assert (images(pipe, family, prompt) - wanted).norm() < 0.01 * apart


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_and_verify(originals, family, tmp_path):
    pipe = erase(copy.deepcopy(originals[family]), remap_to=[TARGET, "johannes vermeer"], router="hash", retain=None)
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True)
    assert more_hf.verify(folder).ok
    loaded = more_hf.load(folder)
    loaded.set_progress_bar_config(disable=True)
    erasure, again = more_hf.get_erasure(pipe), more_hf.get_erasure(loaded)
    assert again.to_dict() == erasure.to_dict() | {"base_revision": None}
    assert_same_images(loaded, pipe, originals[family], family)
    assert more_hf.verify(more_hf.save(loaded, tmp_path / "again")).ok  # nothing but the text encoders to find the prototypes with

    # each site is checked: the original's weight in its place does not pass
    part = next((folder / ("unet" if hasattr(pipe, "unet") else "transformer")).glob("*.safetensors"))
    state = load_file(part)
    name = f"{list(erasure.sites)[-1]}.weight"
    state[name] = weights(originals[family])[name]
    save_file(state, part)
    assert not more_hf.verify(folder).ok
    with pytest.raises(more_hf.IncompatibleBaseError, match="fingerprint"):
        more_hf.load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_save_pretrained_is_erased(originals, erased, family, tmp_path):
    erased[family].save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert more_hf.get_erasure(loaded) is None
    assert_same_images(loaded, erased[family], originals[family], family)


# LoRA


@pytest.mark.parametrize(("family", "format"), [("sdxl", "peft"), ("sdxl", "kohya"), ("sd3", "peft"), ("flux", "peft")])
def test_lora_on_the_original_is_the_erased_pipeline(originals, erased, family, format, tmp_path):
    pipe = copy.deepcopy(originals[family])
    prompt = "a cat by van gogh"
    before, wanted = images(pipe, family, prompt), images(erased[family], family, prompt)
    file = more_hf.save_lora(erased[family], tmp_path, format=format, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    apart = (wanted - before).norm()
    assert apart > 1e-3 * before.norm()
    assert (images(pipe, family, prompt) - wanted).norm() < 0.01 * apart
    sites = more_hf.get_erasure(erased[family]).sites
    assert len({len(value) for key, value in load_file(file).items() if "lora_A" in key or "lora_down" in key}) == 1  # one rank
    assert len(load_file(file)) == len(sites) * (3 if format == "kohya" else 2)

    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state = weights(pipe)
    for name, value in weights(erased[family]).items():
        assert torch.allclose(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_experts_as_adapters(originals, family):
    erased = erase(copy.deepcopy(originals[family]), remap_to=[TARGET, "johannes vermeer"], retain=None)
    pipe, prompt = copy.deepcopy(originals[family]), "a cat by van gogh"
    wanted = [images(with_expert(pipe, more_hf.get_erasure(erased), expert), family, prompt) for expert in (0, 1)]
    for name, state_dict in more_hf.to_adapters(erased).items():
        pipe.load_lora_weights(state_dict, adapter_name=name)
    for expert in (0, 1):
        pipe.set_adapters(f"expert_{expert}")
        assert (images(pipe, family, prompt) - wanted[expert]).norm() < 0.01 * (wanted[0] - wanted[1]).norm()


def test_kohya_keys_of_sdxl(erased, tmp_path):
    tensors = load_file(more_hf.save_lora(erased["sdxl"], tmp_path, format="kohya"))
    names = [f"lora_unet_{name.replace('.', '_')}" for name in EDITED_IN_UNET] + ["lora_unet_label_emb_0_0"]
    assert sorted(tensors) == sorted(f"{name}.{part}" for name in names for part in ("alpha", "lora_down.weight", "lora_up.weight"))
    assert not tensors["lora_unet_label_emb_0_0.lora_down.weight"][:, 20:].any()  # the columns of the time ids
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
def test_lora_that_nothing_could_load_is_refused(erased, family, format, said, tmp_path):
    with pytest.raises(more_hf.ExportError, match=said):
        more_hf.save_lora(erased[family], tmp_path / "lora", format=format)
    assert list(tmp_path.iterdir()) == []
