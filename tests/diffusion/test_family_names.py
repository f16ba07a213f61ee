"""Every family with names of two tokens in the packaged sentences, and what only some families have."""

import re

import pytest
import torch
from support.compare import same
from support.families import FORGET, MATRIX, RETAINED, TARGET, TINY, copied, denoiser_of, erase, weights

import more_hf
from more_hf.core.views import experts_forced, routing_off


pytestmark = pytest.mark.usefixtures("short_prompts")
FOUR = ["sdxl", "sd3", "flux", "pixart"]
SLOW_NEWER = [pytest.param(family, marks=() if family in FOUR else pytest.mark.slow) for family in MATRIX]
WITH_POOLED = ["sdxl", "sd3", "flux", "kandinsky-5", "kolors", "hidream"]


def spaces(pipe):
    """Space -> the factors."""
    erasure = more_hf.get_erasure(pipe)
    return {site.space: erasure.remap_of(name) for name, site in erasure.sites.items()}


@pytest.mark.parametrize("family", SLOW_NEWER)
def test_conditioning_of_the_forget_prompt_is_the_targets_at_every_site(families, erased_families, family):
    before, after = weights(families[family]), weights(erased_families[family])
    erasure = more_hf.get_erasure(erased_families[family])
    for name in erasure.sites:
        P = erasure.remap_of(name).prototypes
        old, new = (state[f"{name}.weight"][:, : len(P.matrix)].double() for state in (before, after))
        forget = [column for column in P.names if column.startswith(FORGET)]
        assert forget
        assert any(column.startswith(RETAINED) for column in P.names)
        for column in P.names:
            if column in forget:
                target = P[column.replace(FORGET, TARGET)]
                apart = (old @ P[column] - old @ target).norm()
                assert apart > 1e-3 * (old @ target).norm()
                assert (new @ P[column] - old @ target).norm() < 1e-3 * apart
            else:  # the target, the retained name, the begin token and the empty prompt
                assert (new @ P[column] - old @ P[column]).norm() < 1e-4 * (old @ P[column]).norm()


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
@pytest.mark.parametrize("family", WITH_POOLED)
def test_without_the_pooled_path(families, erased_families, family):
    original, pipe = families[family], erase(copied(families[family]), pooled=False)
    before, sites = weights(original), TINY[family].sites
    (pooled,) = [name for name, space in sites.items() if space == "pooled"]
    assert torch.equal(weights(pipe)[f"{pooled}.weight"], before[f"{pooled}.weight"])
    assert more_hf.get_erasure(pipe).sites.keys() == sites.keys() - {pooled}
    assert f"still enters through `{pooled}`" in more_hf.get_erasure(pipe).to_markdown()
    assert "pooled_rank" not in more_hf.get_erasure(pipe).guarantees

    # what the pooled embedding says is left, and only that
    whole, half = weights(erased_families[family]), weights(pipe)
    kept = {f"{pooled}.weight": before[f"{pooled}.weight"]}
    assert all(torch.allclose(half[name], value, atol=1e-5) for name, value in {**whole, **kept}.items())

    erase(pipe, "andy warhol")  # a refit edits it too
    assert not torch.equal(weights(pipe)[f"{pooled}.weight"], before[f"{pooled}.weight"])
    assert same(denoiser_of(more_hf.restore(pipe)), before)


def test_positional_arguments_are_routed(families):
    pipe = erase(copied(families["sd3"]), remap_to=[TARGET, "johannes vermeer"], router="random")
    erasure, transformer = more_hf.get_erasure(pipe), pipe.transformer
    latents, tokens, pooled = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 48), torch.ones(1, 40)
    time = torch.tensor([500.0])
    names = ("encoder_hidden_states", "pooled_projections", "timestep")
    with torch.no_grad(), experts_forced(erasure, torch.tensor([1])):
        named = transformer(latents, **dict(zip(names, (tokens, pooled, time), strict=True))).sample
        assert torch.equal(transformer(latents, tokens, pooled, time).sample, named)
        with routing_off(erasure):
            unrouted = transformer(latents, tokens, pooled, time).sample
        assert not torch.allclose(unrouted, named, rtol=1e-4)
