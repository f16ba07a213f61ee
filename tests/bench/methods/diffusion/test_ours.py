"""The paper's own configuration, and the ablation with and without PO in two metrics."""

from collections import Counter

import numpy as np
import pytest
import torch
from support.methods import CONCEPT, MANY, RETAIN, TARGET, run
from support.texts import last, text_layers, tokens

import more_hf
from more_hf.core.errors import MoreError, PrototypeError
from more_hf.core.moment import Moment
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf_bench.methods.diffusion.midsteer import Map
from more_hf_bench.methods.diffusion.ours import more_paper, without_orthogonalization


KEPT = [TARGET, *RETAIN]


def targets_of(pipe):
    """What each expert sends each forgotten name to."""
    remap = more_hf.get_erasure(pipe).remaps["tokens"]
    names = [name.partition(" · ")[0] for name in remap.prototypes.names]
    return [[names[column] for column in expert] for expert in remap.targets.tolist()]


def test_the_papers_experts_are_algorithm_1(tiny_sd):
    """D = P⁺ over everything that is kept, and what is merged is the mean of E = I + (P_t − P_F) D_F.

    The begin token and the empty prompt's end and padding are kept, as in every edit of this package."""
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("more-paper", pipe, tokens="last", seed=1)
    P = np.stack([last(pipe, name).numpy() for name in (CONCEPT, *KEPT)], axis=1)
    begin, end, *padding = tokens(pipe, "")[0].numpy()
    read = np.linalg.pinv(np.column_stack([P, begin, end, np.mean(padding, axis=0)]))[0]
    drawn = [names[0] for names in targets_of(pipe)]
    assert len(drawn) == len(KEPT)
    shift = np.mean([P[:, 1 + KEPT.index(name)] for name in drawn], axis=0) - P[:, 0]
    for name, W in text_layers(pipe).items():
        old = before[name].numpy()
        assert np.allclose(W.numpy(), old + np.outer(old @ shift, read), atol=1e-5)
        assert not np.allclose(W.numpy(), old, atol=1e-3)
    erasure = more_hf.get_erasure(pipe)
    assert (erasure.request.router, erasure.remaps["tokens"].solver) == ("random", "pinv")


def test_the_papers_targets_are_drawn_uniformly_with_repeats(monkeypatch):
    """Every seed by itself, each forgotten name by itself. Without replacement no name would come twice."""
    asked = []
    monkeypatch.setattr(
        "more_hf_bench.methods.diffusion.ours.erase_concept", lambda *args, **settings: asked.append(settings)
    )
    for seed in range(400):
        more_paper(None, MANY, remap_to=[TARGET], retain=RETAIN, seed=seed)
    draws = {name: [settings["remap_to"][name] for settings in asked] for name in MANY}
    for drawn in draws.values():
        counts = Counter(name for names in drawn for name in names)
        assert set(counts) == set(KEPT)
        assert all(abs(count - 400) < 5 * (1200 * 2 / 9) ** 0.5 for count in counts.values())
        # all three are different in 3! of 3³ draws
        distinct = sum(len(set(names)) == 3 for names in drawn)
        assert abs(distinct - 400 * 6 / 27) < 5 * (400 * 6 / 27 * 21 / 27) ** 0.5
    assert len(set(map(tuple, draws[CONCEPT]))) == 27
    assert draws[CONCEPT] != draws["kelly mckernan"]
    more_paper(None, CONCEPT, remap_to=None, retain=RETAIN, num_experts=40)
    assert len(asked[-1]["remap_to"][CONCEPT]) == asked[-1]["num_experts"] == 40
    with pytest.raises(MoreError, match="none"):
        more_paper(None, CONCEPT, remap_to=None, retain=None)


@pytest.mark.parametrize("solver", ["pinv", "covariance"])
def test_without_po_is_the_least_change_that_sends_the_forgotten_alone(solver):
    """Of all E with E p_f = p_t, the one with the smallest tr((E − I) Σ (E − I)ᵀ), by its Lagrangian."""
    rng = np.random.default_rng(0)
    P, Z = rng.normal(size=(6, 3)), rng.normal(size=(40, 6)) * [5, 1, 1, 1, 1, 0.2]
    S = np.eye(6)
    if solver == "covariance":
        S = Z.T @ Z / 40
        S += 1e-4 * np.trace(S) / 6 * np.eye(6)
    prototypes = Prototypes(torch.from_numpy(P), tuple("abc"), torch.ones(3)).with_moment(
        Moment(torch.from_numpy(Z.T @ Z / 40), 1)
    )
    remap = without_orthogonalization(prototypes, ["a", "b"], [["c", None]], solver=solver)
    P_F, P_t = P[:, :2], np.stack([P[:, 2], np.zeros(6)], axis=1)
    multipliers = np.linalg.solve(P_F.T @ np.linalg.solve(S, P_F), (P_t - P_F).T)
    expected = np.eye(6) + np.linalg.solve(S, P_F @ multipliers).T
    E = remap.apply(torch.eye(6).double()).T.numpy()
    assert np.allclose(E, expected, atol=1e-9)
    assert np.allclose(E @ P_F, P_t, atol=1e-9)
    assert np.linalg.norm(E @ P[:, 2] - P[:, 2]) > 1e-2  # the target itself moves
    with pytest.raises(PrototypeError, match="soft"):
        without_orthogonalization(prototypes, ["a"], [["c"]], solver="soft")


def test_without_po_and_centered_it_is_midsteer():
    """MidSteer's map of activations x to A (x − μ) + μ, whose A `test_it_is_the_papers_matrix` has, for one
    concept. With PO the target stays as well, which MidSteer moves on."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)) + 3
    concept, target = rng.normal(size=(2, 6)) + 3
    mean, S = X.mean(0), np.cov(X.T, bias=True)
    fitted = Map.fit(*map(torch.from_numpy, (concept, target, mean, S)))
    A = np.eye(6) + np.outer(fitted.shift, fitted.reader)
    centered = torch.from_numpy(np.stack([concept, target], 1) - mean[:, None])
    prototypes = Prototypes(centered, ("a", "b"), torch.ones(2)).with_moment(Moment(torch.from_numpy(S), 1))
    metric = {"solver": "covariance", "shrinkage": 1e-13}

    def matrix(remap):
        return remap.apply(torch.eye(6).double()).T.numpy()

    assert np.allclose(matrix(without_orthogonalization(prototypes, ["a"], [["b"]], **metric)), A, atol=1e-9)
    with_po = matrix(Remap.fit(prototypes, ["a"], [["b"]], **metric))
    for E in (A, with_po):
        assert np.allclose(E @ (concept - mean), target - mean, atol=1e-8)
    assert np.allclose(with_po @ (target - mean), target - mean, atol=1e-8)
    assert not np.allclose(A @ (target - mean), target - mean, atol=1e-2)


ABLATION = {
    "more-pinv": ("pinv", True),
    "more-covariance": ("covariance", True),
    "more-without-po": ("pinv", False),
    "more-without-po-covariance": ("covariance", False),
}


def test_the_ablation_changes_one_thing_at_a_time(tiny_sd):
    """In each metric, the forgotten name goes to its target; with PO what is in P stays, without it moves."""
    moved = {}
    for name, (solver, orthogonal) in ABLATION.items():
        pipe = tiny_sd("1")
        before = text_layers(pipe)
        run(name, pipe, tokens="last")
        c, g, r = (last(pipe, text).numpy() for text in (CONCEPT, TARGET, RETAIN[0]))
        held = {"kept": g, "retained": r} if solver == "pinv" else {"kept": g}
        for layer, W in text_layers(pipe).items():
            W, old = W.numpy(), before[layer].numpy()
            assert np.allclose(W @ c, old @ g, atol=1e-5)
            for what, z in held.items():
                change = np.linalg.norm(W @ z - old @ z) / np.linalg.norm(old @ z)
                assert (change < 1e-5) if orthogonal else (change > 1e-3), (name, what, change)
            moved[name, layer] = W
    for layer in before:
        for one in ("more-pinv", "more-without-po"):  # the same in two metrics
            other = one.removesuffix("-pinv") + "-covariance"
            assert not np.allclose(moved[one, layer], moved[other, layer], atol=1e-4)
