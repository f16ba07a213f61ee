"""UCE: its two scripts against the formula layer by layer."""

import pytest
import torch
from support.closed_forms import CONCEPT, MANY, RETAIN, TARGET, paper_sequences, run, uce_layer
from support.texts import last, text_layers, tokens

from more_hf.core.errors import MoreError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf_bench.methods.diffusion.uce import edit_matrix
from more_hf_bench.methods.registry import DIFFUSION


def test_uce_matrix_on_two_axes():
    c, g = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    A = edit_matrix(c, g, c[:0], lamb=1.0, erase_scale=1.0, preserve_scale=1.0)
    assert torch.allclose(A, torch.tensor([[0.5, 0.0], [0.5, 1.0]]).double())


@pytest.mark.parametrize("version", ["1", "2"])
def test_uce_is_the_formula_layer_by_layer(tiny_sd, version):
    pipe = tiny_sd(version)
    before = text_layers(pipe)
    kept = [last(pipe, name) for name in (TARGET, *RETAIN)]
    run("uce", pipe)
    for name, W in text_layers(pipe).items():
        expected = uce_layer(before[name], [last(pipe, CONCEPT)], [last(pipe, TARGET)], kept, 0.5, 1.0, 1.0)
        assert torch.allclose(W, expected, atol=1e-6)
        assert not torch.allclose(W, before[name], atol=1e-3)


def test_uce_takes_art_as_guide_without_a_target_and_expands_prompts(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("uce", pipe, remap_to=None, retain=None, expand="art")
    forms = ["{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"]
    old, new = ([last(pipe, form.format(name)) for form in forms] for name in (CONCEPT, "art"))
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, new, [], 0.5, 1.0, 1.0), atol=1e-6)


def test_uce_of_several_concepts_sends_each_to_the_mean_of_the_targets(tiny_sd):
    pipe, targets = tiny_sd("1"), [TARGET, "johannes vermeer"]
    before = text_layers(pipe)
    DIFFUSION["uce"].load()(pipe, MANY, remap_to=targets, retain=RETAIN)
    old = [last(pipe, name) for name in (CONCEPT, "vincent", "kelly mckernan")]
    new, kept = (
        sum(last(pipe, name) for name in targets) / 2,
        [last(pipe, name) for name in (*targets, *RETAIN)],
    )
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, [new] * 3, kept, 0.5, 1.0, 1.0), atol=1e-6)


def test_uce_of_the_paper_edits_sequences(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    assert len(old) == len(new) < len(tokens(pipe, CONCEPT)[0]) - 1
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    run("uce", pipe, variant="paper")
    for name, W in text_layers(pipe).items():
        expected = uce_layer(before[name], old, new, kept, 0.5, 1.0, 0.25)  # one over four prompts
        assert torch.allclose(W, expected, atol=1e-6)
    with pytest.raises(MoreError, match="variant"):
        run("uce", pipe, variant="2025")


def test_uce_for_small_lambda_is_remap_with_one_expert(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    names = (CONCEPT, TARGET, *RETAIN)
    P = Prototypes(torch.stack([last(pipe, name) for name in names], dim=1), names, torch.ones(len(names)))
    remap = Remap.fit(P, forget=[CONCEPT], targets=[[TARGET]])
    distances = []
    for lamb in (1e-9, 1.0):
        edited = tiny_sd("2")
        run("uce", edited, lamb=lamb)
        pairs = [(W, remap.merged(before[name])) for name, W in text_layers(edited).items()]
        distances.append(
            max(
                float((a - b).norm() / (b - before[name]).norm())
                for name, (a, b) in zip(before, pairs, strict=True)
            )
        )
    assert distances[0] < 1e-4
    assert distances[1] > 1e-3
