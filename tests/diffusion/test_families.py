"""Stable Diffusion XL and 3, FLUX and PixArt: which layers are edited, and what is exact there."""

import copy
import re

import pytest
import torch
from accelerate import cpu_offload
from support.compare import assert_proved
from support.families import (
    FAMILIES,
    FORGET,
    RETAINED,
    T5_LENGTH,
    TARGET,
    copied,
    denoiser_of,
    embeds,
    erase,
    images,
    spaces,
    weights,
)
from support.pipelines import build_tiny_sd

import more_hf


pytestmark = pytest.mark.usefixtures("short_prompts")

SDXL_KEYS_AND_VALUES = [
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
    "sdxl": SDXL_KEYS_AND_VALUES,
    "sd3": ["context_embedder"],
    "flux": ["context_embedder"],
    "pixart": ["caption_projection.linear_1"],
}
POOLED_SITE = {
    "sdxl": "add_embedding.linear_1",
    "sd3": "time_text_embed.text_embedder.linear_1",
    "flux": "time_text_embed.text_embedder.linear_1",
}
WITH_POOLED = list(POOLED_SITE)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_exactly_the_layers_that_read_text(families, erased_families, family):
    sites = [*TOKEN_SITES[family], *([POOLED_SITE[family]] if family in POOLED_SITE else [])]
    before, after = weights(families[family]), weights(erased_families[family])
    assert sorted(name for name in after if not torch.equal(after[name], before[name])) == sorted(
        f"{name}.weight" for name in sites
    )
    assert sorted(more_hf.get_erasure(erased_families[family]).sites) == sorted(sites)


def test_the_columns_of_the_time_ids_stay(families, erased_families):
    before, after = (
        weights(pipes["sdxl"])["add_embedding.linear_1.weight"] for pipes in (families, erased_families)
    )
    assert before.shape == (16, 20 + 6 * 4)
    assert torch.equal(before[:, 20:], after[:, 20:])
    assert (before[:, :20] != after[:, :20]).any(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_conditioning_of_the_forget_prompt_is_the_targets_at_every_site(families, erased_families, family):
    before, after = weights(families[family]), weights(erased_families[family])
    erasure = more_hf.get_erasure(erased_families[family])
    for name in erasure.sites:
        P = erasure.remap_of(name).prototypes
        old, new = (state[f"{name}.weight"][:, : len(P.matrix)].double() for state in (before, after))
        forget = [column for column in P.names if column.startswith(FORGET)]
        assert forget
        for column in P.names:
            if column in forget:
                target = P[column.replace(FORGET, TARGET)]
                assert (old @ P[column] - old @ target).norm() > 1e-3 * (old @ target).norm()
                assert (new @ P[column] - old @ target).norm() < 1e-3 * (
                    old @ P[column] - old @ target
                ).norm()
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
        ids = getattr(pipe, "tokenizer" + number)(
            prompt, padding="max_length", max_length=T5_LENGTH, return_tensors="pt"
        )
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


# Where the bare name's last token, the end token and the padding are: [CLS] van gogh [END] ..., and two
# tokens and </s> in T5.
POSITIONS = {
    "sdxl": {"last": (2, 3), "end": (3, 4), "padding": (4, 48)},
    "sd3": {"last": (2, 3), "end": (3, 4), "T5 last": (49, 50), "T5 end": (50, 51), "T5 padding": (51, 72)},
    "flux": {"last": (1, 2), "end": (2, 3), "padding": (3, 24)},
    "pixart": {"last": (1, 2), "end": (2, 3)},
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prototypes_are_the_features_that_the_denoiser_reads(families, monkeypatch, family):
    monkeypatch.setattr("more_hf.diffusion.plan.TEMPLATES", ("{}",))
    monkeypatch.setitem(
        more_hf.diffusion.encoder.TOKENS, "positions", ("last", "end", "padding")
    )  # nothing is after a bare name
    erased = erase(copied(families[family]), retain=None)
    tokens, pooled = reference_features(families[family], family, FORGET)
    remaps = spaces(erased)
    for kind, (start, stop) in POSITIONS[family].items():
        wanted = tokens[0, start:stop].mean(0).double()
        assert torch.allclose(remaps["tokens"].prototypes[f"{FORGET} · {kind}"], wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            remaps["tokens"].prototypes[f"{TARGET} · {kind}"], wanted, rtol=1e-4, atol=1e-5
        )
    kinds = {name.split(" · ")[1] for name in remaps["tokens"].prototypes.names if " · " in name}
    assert kinds == set(POSITIONS[family]) | ({"padding"} if family == "sd3" else set())
    assert (pooled is None) == ("pooled" not in remaps)
    if pooled is not None:
        assert torch.allclose(
            remaps["pooled"].prototypes[f"{FORGET} · pooled"], pooled[0].double(), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_move_for_the_forgotten_prompt_only(families, erased_families, family):
    remaps = spaces(erased_families[family])
    prompts = {name: embeds(remaps, name, masked=family == "pixart") for name in (FORGET, TARGET, RETAINED)}
    before = {name: images(families[family], family, **prompt) for name, prompt in prompts.items()}
    after = {name: images(erased_families[family], family, **prompt) for name, prompt in prompts.items()}
    apart = (before[FORGET] - before[TARGET]).norm()
    assert apart > 1e-3 * before[FORGET].norm()
    assert (after[FORGET] - before[FORGET]).norm() > 0.99 * apart
    for name, wanted in ((FORGET, TARGET), (TARGET, TARGET), (RETAINED, RETAINED)):
        assert (after[name] - before[wanted]).norm() < 0.01 * apart


@pytest.mark.parametrize("family", FAMILIES)
def test_guarantees_and_proof_cover_every_space(erased_families, family):
    erasure = more_hf.get_erasure(erased_families[family])
    keys = ("forget_to_target", "remain_fixed", "idempotent", "nothing_left")
    for prefix in ("", "pooled_") if family in POOLED_SITE else ("",):
        assert all(erasure.guarantees[prefix + key] < 1e-8 for key in keys)
    assert_proved(erasure)
    assert any("`clip_skip`" in leak for leak in erasure.facts.leaks) == (family in ("sdxl", "sd3"))
    assert any("case-sensitive" in leak for leak in erasure.facts.leaks) == (family in ("sd3", "flux"))
    assert not any("pooled" in leak for leak in erasure.facts.leaks)


def test_every_space_has_its_own_solver(families):
    pipe = erase(copied(families["flux"]), solver="auto")
    tokens, pooled = more_hf.get_erasure(pipe).facts.solver_reason.split("; pooled: ")
    assert "in 48 dimensions" in tokens
    assert "in 32 dimensions" in pooled
    for reason in (tokens, pooled):
        assert all(re.search(rf"{solver} [\d.]+ %", reason) for solver in ("pinv", "covariance"))
    remaps = spaces(pipe)
    assert pooled.startswith(remaps["pooled"].solver)
    assert more_hf.get_erasure(pipe).facts.solver == remaps["tokens"].solver


@pytest.mark.slow
@pytest.mark.parametrize("site", ["tokens", "pooled"])
@pytest.mark.parametrize("family", WITH_POOLED)
@pytest.mark.parametrize("router", [None, "random"])
def test_the_proof_sees_a_missed_layer_on_either_path(families, family, site, router):
    pipe = copied(families[family])
    name = POOLED_SITE[family] if site == "pooled" else TOKEN_SITES[family][-1]
    layer = denoiser_of(pipe).get_submodule(name)
    weight = layer.weight.detach().clone()
    layer.forward = lambda x: torch.nn.functional.linear(x, weight, layer.bias)
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="proof by run failed"):
        erase(pipe, router=router)
    after = weights(pipe)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not denoiser_of(pipe)._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_POOLED)
def test_without_the_pooled_path(families, erased_families, family):
    before, pipe = weights(families[family]), erase(copied(families[family]), pooled=False)
    name = POOLED_SITE[family]
    assert torch.equal(weights(pipe)[f"{name}.weight"], before[f"{name}.weight"])
    assert sorted(more_hf.get_erasure(pipe).sites) == sorted(TOKEN_SITES[family])
    leak = (
        "the pooled prompt embedding was left as it is, so what it says about the concept still enters "
        f"through `{name}`"
    )
    assert leak in more_hf.get_erasure(pipe).to_markdown()
    assert "pooled_rank" not in more_hf.get_erasure(pipe).guarantees

    # the image of the forgotten prompt still has what the pooled embedding says, and only that
    remaps = spaces(erased_families[family])
    forget, target = (embeds(remaps, name) for name in (FORGET, TARGET))
    left = images(
        families[family], family, **{**target, "pooled_prompt_embeds": forget["pooled_prompt_embeds"]}
    )
    gone = images(families[family], family, **target)
    found = images(pipe, family, **forget)
    assert (left - gone).norm() > 1e-3 * gone.norm()
    assert (found - left).norm() < 0.01 * (left - gone).norm()

    erase(pipe, "andy warhol")  # a refit edits it too
    assert not torch.equal(weights(pipe)[f"{name}.weight"], before[f"{name}.weight"])
    after = weights(more_hf.restore(pipe))
    assert all(torch.equal(after[name], before[name]) for name in before)


# Stable Diffusion 1.x reads the last layer, 2.x the last of an encoder that ships without its last layer, not
# the one before it.
@pytest.mark.parametrize("version", ["1", "2"])
@torch.no_grad()
def test_prototypes_of_sd_are_of_the_layer_that_encode_prompt_reads(version):
    pipe = build_tiny_sd(version)
    encoded = pipe.text_encoder(torch.tensor([pipe.tokenizer(FORGET).input_ids]), output_hidden_states=True)
    remap = more_hf.get_erasure(erase(pipe, tokens="last", retain=None)).remap
    found = remap.prototypes[f"{FORGET} · bare last"]
    assert torch.allclose(found, encoded.last_hidden_state[0, 2].double(), rtol=1e-4, atol=1e-5)
    assert (found - encoded.hidden_states[-2][0, 2]).norm() > 0.1 * found.norm()


def test_columns_under_sequential_offload(families, erased_families):
    pipe = copied(families["sdxl"])
    before, wanted = weights(families["sdxl"]), weights(erased_families["sdxl"])
    cpu_offload(pipe.unet, torch.device("cpu"))
    held = pipe.unet.add_embedding.linear_1._hf_hook.weights_map
    erase(pipe)
    assert pipe.unet.add_embedding.linear_1.weight.is_meta
    assert torch.equal(held["weight"], wanted["add_embedding.linear_1.weight"])
    more_hf.restore(pipe)
    assert torch.equal(held["weight"], before["add_embedding.linear_1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(families, family, dtype):
    pipe = copy.deepcopy(families[family]).to(dtype)
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
