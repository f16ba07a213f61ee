"""UCE, RECE, CURE, SPEED, OCE and ours without PO, each against a computation that shares no code with it."""

import numpy as np
import pytest
import torch

from more_hf.bench.methods.registry import DIFFUSION
from more_hf.core.errors import MoreError, PrototypeError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap


CONCEPT, TARGET, RETAIN = "van gogh", "claude monet", ["pablo picasso", "andy warhol"]
CLOSED = ["uce", "rece", "cure", "speed", "oce", "more-without-po"]
VALUES_ONLY = {"speed", "oce"}


def run(name, pipe, remap_to=(TARGET,), retain=RETAIN, **settings):
    remap_to = None if remap_to is None else list(remap_to)
    if name == "oce":
        settings.setdefault("expand", None)  # six prompts would span all four outputs of the smallest tiny layers
    return DIFFUSION[name].load()(pipe, CONCEPT, remap_to=remap_to, retain=retain, **settings)


def weights(pipe):
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def text_layers(pipe, ends=("to_k", "to_v")):
    """Keys and values of the cross-attentions, in float64: `attn2` is what tiny UNets call them."""
    named = pipe.unet.named_parameters()
    return {n: w.detach().double().clone() for n, w in named if "attn2" in n and n.split(".")[-2] in ends}


def tokens(pipe, prompt):
    """Features `(tokens, d)` of a prompt and how many positions are not padding, straight from tokenizer and text encoder."""
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt")
    with torch.no_grad():
        features = pipe.text_encoder(ids.input_ids)[0][0].double()
    return features, len(pipe.tokenizer(prompt).input_ids)


def last(pipe, prompt):
    features, used = tokens(pipe, prompt)
    return features[used - 2]


def uce_layer(W, old, new, kept, lamb, erase, preserve):
    """The formula as a loop over embeddings, for one layer."""
    left, right = lamb * W, lamb * torch.eye(W.shape[1], dtype=W.dtype)
    for c, g in zip(old, new, strict=True):
        left, right = left + erase * torch.outer(W @ g, c), right + erase * torch.outer(c, c)
    for r in kept:
        left, right = left + preserve * torch.outer(W @ r, r), right + preserve * torch.outer(r, r)
    return left @ torch.inverse(right)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", CLOSED)
def test_moves_the_picture_and_only_layers_that_read_text(tiny_sd, name, version):
    pipe = tiny_sd(version)
    ask = {"num_inference_steps": 2, "output_type": "latent", "prompt": [f"a cat by {CONCEPT}"]}
    picture = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    before, state, numpy_state = weights(pipe), torch.get_rng_state(), np.random.get_state()[1].copy()
    assert run(name, pipe) is pipe
    changed = {key for key, value in weights(pipe).items() if not torch.equal(value, before[key])}
    assert changed == {f"unet.{key}" for key in text_layers(pipe, ("to_v",) if name in VALUES_ONLY else ("to_k", "to_v"))}
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    after = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    assert torch.isfinite(after).all()
    assert (after - picture).abs().max() > 1e-3


@pytest.mark.parametrize("name", CLOSED)
def test_works_in_half_precision_and_without_targets_or_retained_names(tiny_sd, name):
    pipe = tiny_sd("1")
    pipe.unet.to(torch.bfloat16)
    before = weights(pipe)
    run(name, pipe, remap_to=None, retain=None)  # "art" stands in where a method needs a guide
    assert any(not torch.equal(value, before[key]) for key, value in weights(pipe).items())
    assert {value.dtype for key, value in text_layers_raw(pipe)} == {torch.bfloat16}


def text_layers_raw(pipe):
    return [(n, w) for n, w in pipe.unet.named_parameters() if "attn2" in n]


@pytest.mark.parametrize("name", CLOSED)
def test_names_are_checked_and_nothing_is_changed_then(tiny_sd, name):
    pipe = tiny_sd("1")
    before = weights(pipe)
    with pytest.raises(PrototypeError, match="both erased"):
        run(name, pipe, retain=["Van Gogh"])
    assert all(torch.equal(value, before[key]) for key, value in weights(pipe).items())


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


MANY = {CONCEPT: ["vincent"], "kelly mckernan": []}


def test_uce_of_several_concepts_sends_each_to_the_mean_of_the_targets(tiny_sd):
    pipe, targets = tiny_sd("1"), [TARGET, "johannes vermeer"]
    before = text_layers(pipe)
    DIFFUSION["uce"].load()(pipe, MANY, remap_to=targets, retain=RETAIN)
    old = [last(pipe, name) for name in (CONCEPT, "vincent", "kelly mckernan")]
    new, kept = sum(last(pipe, name) for name in targets) / 2, [last(pipe, name) for name in (*targets, *RETAIN)]
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, [new] * 3, kept, 0.5, 1.0, 1.0), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "uce"])
def test_several_concepts_with_aliases(tiny_sd, name):
    pipe = tiny_sd("1", block_out_channels=(16, 32))
    before = text_layers(pipe, ("to_v",))
    DIFFUSION[name].load()(pipe, MANY, remap_to=[TARGET, "johannes vermeer"], retain=RETAIN)
    assert all((W - before[key]).norm() > 1e-4 for key, W in text_layers(pipe, ("to_v",)).items())


def paper_sequences(pipe, concept, target):
    (old, n_old), (new, n_new) = tokens(pipe, concept), tokens(pipe, target)
    a, b = n_old - 2, n_new - 2
    shift = max(a, b)
    return old[a : len(old) - (shift - a)], new[b : len(new) - (shift - b)]


def test_uce_of_the_paper_edits_sequences(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    assert len(old) == len(new) < len(tokens(pipe, CONCEPT)[0]) - 1
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    run("uce", pipe, variant="paper")
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(before[name], old, new, kept, 0.5, 1.0, 0.25), atol=1e-6)  # one over four prompts
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
        distances.append(max(float((a - b).norm() / (b - before[name]).norm()) for name, (a, b) in zip(before, pairs, strict=True)))
    assert distances[0] < 1e-4
    assert distances[1] > 1e-3


def test_rece_is_its_two_steps_layer_by_layer(tiny_sd):
    pipe = tiny_sd("1")
    original = text_layers(pipe)
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    first = {name: uce_layer(W, old, new, kept, 0.5, 1.0, 0.1) for name, W in original.items()}
    c, g = tokens(pipe, CONCEPT)[0], tokens(pipe, TARGET)[0]
    left = 1e-3 * torch.eye(c.shape[1]).double() + sum(first[name].T @ first[name] for name in first)
    adversarial = (torch.inverse(left) @ sum(first[name].T @ original[name] for name in first) @ c.T).T
    run("rece", pipe)
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(first[name], adversarial, g, kept, 0.1, 1.0, 0.1), atol=1e-5)
        assert not torch.allclose(W, first[name], atol=1e-4)


def test_rece_without_epochs_is_the_paper_variant_of_uce(tiny_sd):
    a, b = tiny_sd("1"), tiny_sd("1")
    run("rece", a, epochs=0)
    run("uce", b, variant="paper", preserve_scale=0.1)
    assert all(torch.equal(x, y) for x, y in zip(text_layers(a).values(), text_layers(b).values(), strict=True))


def test_cure_is_the_formula_on_content_tokens(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)

    def projector(names):
        rows = np.concatenate([features[1 : used - 1].numpy() for features, used in (tokens(pipe, name) for name in names)])
        values, vectors = np.linalg.eigh(rows.T @ rows)  # squares of the singular values
        share = values.clip(0) / values.sum()
        return vectors @ np.diag(2 * share / (share + 1)) @ vectors.T

    P_f, P_r = projector([CONCEPT]), projector([TARGET, *RETAIN])
    run("cure", pipe)
    for name, W in text_layers(pipe).items():
        assert np.allclose(W.numpy(), before[name].numpy() @ (np.eye(32) - (P_f - P_f @ P_r)), atol=1e-6)


def test_speed_leaves_begin_token_and_retained_names_exactly(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("speed", pipe, threshold=1e-9, prior_filter=False)
    empty = tokens(pipe, "")[0]
    for name, W in text_layers(pipe, ("to_v",)).items():
        change = W - before[name]
        for z in (empty[0], *(last(pipe, kept) for kept in (TARGET, *RETAIN))):
            assert (change @ z).norm() < 1e-5 * (before[name] @ z).norm()
        assert (change @ last(pipe, CONCEPT)).norm() > 1e-2 * (before[name] @ last(pipe, CONCEPT)).norm()


def test_oce_rotates_each_value_layer(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    run("oce", pipe)
    for name, W in text_layers(pipe, ("to_v",)).items():
        Q = W @ torch.linalg.pinv(before[name])  # the tiny layers have full row rank
        assert torch.allclose(Q @ Q.T, torch.eye(len(Q)).double(), atol=1e-5)
        assert float(torch.linalg.det(Q)) == pytest.approx(1, abs=1e-5)
        assert (Q - torch.eye(len(Q)).double()).norm() > 0.1


def test_oce_that_erases_nothing_changes_nothing(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)
    run("oce", pipe, erase_scale=0.0)
    assert all(torch.allclose(W, before[name], atol=1e-6) for name, W in text_layers(pipe).items())


def test_without_po_sends_the_concept_and_does_not_spare_the_others(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("more-without-po", pipe, tokens="last")
    c, g, r = (last(pipe, name).numpy() for name in (CONCEPT, TARGET, RETAIN[0]))
    for name, W in text_layers(pipe).items():
        W, old = W.numpy(), before[name].numpy()
        assert np.allclose(W, old + np.outer(old @ (g - c), c) / (c @ c), atol=1e-6)
        assert np.allclose(W @ c, old @ g, atol=1e-5)
        assert np.linalg.norm(W @ r - old @ r) > 1e-2 * np.linalg.norm(old @ r)
