"""Numbers of the class benchmark, each against scikit-learn, numpy, a loop, or a case by hand."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from more_hf_bench.classes.metrics import (
    accuracy,
    auc,
    class_means,
    confidence,
    expert_load,
    harmonic_mean,
    kd_scores,
    linear_cka,
    loss_attack,
    modified_entropy,
    prototype_cosines,
    sample_losses,
    shadow_attack,
)
from more_hf_bench.classes.probes import Probe, converged_probe, new_heads, probe_scores, sgd_probes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(n=600, d=8, k=4, spread=1.0, seed=0):
    """Gaussian classes with means of their own, not centred, `n` samples in turn."""
    means = 2 * torch.randn(k, d, generator=generator(100)) + 1
    labels = torch.arange(n) % k
    return means[labels] + spread * torch.randn(n, d, generator=generator(seed)), labels


# accuracies


def test_accuracy_is_percent():
    logits = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    assert accuracy(logits, torch.tensor([0, 1, 0])) == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(logits[:0], torch.zeros(0, dtype=torch.int64))


def test_harmonic_mean_reproduces_the_paper():
    """Rows of MoRE's Table 1, to the digits printed there."""
    for acc_f, acc_r, hm in ((99.92, 99.94, 0.16), (0.0, 99.15, 99.57), (72.62, 97.06, 42.71)):
        assert harmonic_mean(acc_f, acc_r) == pytest.approx(hm, abs=0.006)
    assert harmonic_mean(100, 0) == 0
    assert kd_scores({"f": 0, "r": 100, "ft": 100, "rt": 50}) == {
        "acc_f": 0, "acc_r": 100, "acc_ft": 100, "acc_rt": 50, "hm": 100, "hm_t": 0
    }  # fmt: skip


def test_auc_is_the_share_of_pairs_with_ties_counted_half():
    positive, negative = (
        torch.randint(0, high, (n,), generator=generator(high)).float() for high, n in ((9, 70), (7, 110))
    )
    above = (positive[:, None] > negative).double() + 0.5 * (positive[:, None] == negative)
    assert auc(positive, negative) == pytest.approx(100 * above.mean().item())
    assert auc(positive + 100, negative) == 100
    noise = 1e-7 * torch.arange(70)  # an order that is rounding, not evidence
    assert auc(noise + 1e-5, noise) > 99
    assert auc(noise + 1e-5, noise, resolution=1e-3) == 50


def test_expert_load_by_hand():
    load = expert_load(torch.tensor([0, 0, 0, 1]), 3)
    assert load == pytest.approx(np.std([3, 1, 0]) / np.mean([3, 1, 0]))
    assert expert_load(torch.arange(12) % 3, 3) == pytest.approx(0, abs=1e-12)
    assert expert_load(torch.full((1000,), 3), 80) == pytest.approx(79**0.5)


# probes


def one_after_another(features, labels, k, lr, seed, epochs, batch_size):
    """A probe as anyone would write it: nn.Linear, torch's SGD, one batch at a time."""
    weight, shuffle = new_heads(features(0, seed).shape[1], k, seed)
    head = nn.Linear(weight.shape[1], k)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=lr)
    for epoch in range(epochs):
        z = features(epoch, seed)
        for rows in torch.randperm(len(labels), generator=shuffle).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(z[rows]), labels[rows]).backward()
            optimizer.step()
    return head


@pytest.mark.slow
def test_batched_probes_are_the_single_ones():
    z, labels = blobs()
    z = z[:570]  # the last batch is a short one
    labels = labels[:570]

    def redrawn(epoch, seed):
        return z + 0.5 * torch.randn(z.shape, generator=generator(1000 * epoch + seed))

    for features in (lambda epoch, seed: z, redrawn):
        probes = sgd_probes(features, labels, 4, learning_rates=(0.1, 0.001), seeds=(3, 5, 4), epochs=3)
        assert list(probes) == [(lr, seed) for lr in (0.1, 0.001) for seed in (3, 5, 4)]
        for (lr, seed), probe in probes.items():
            head = one_after_another(features, labels, 4, lr, seed, epochs=3, batch_size=64)
            assert torch.allclose(probe.weight, head.weight, atol=1e-5)
            assert torch.allclose(probe.bias, head.bias, atol=1e-5)
            assert (probe.weight - new_heads(8, 4, seed)[0]).abs().max() > 0.01
    one = {"learning_rates": (0.1,), "seeds": (0,), "epochs": 2}
    fixed, fresh = (sgd_probes(f, labels, 4, **one)[0.1, 0] for f in (z, redrawn))
    assert (fixed.weight - fresh.weight).abs().max() > 0.01


def gradient(probe, z, labels, C):
    """Of the mean cross-entropy + ‖W‖² / (2 C n), in float64."""
    head = [part.detach().double().requires_grad_() for part in (probe.weight, probe.bias)]
    entropy = nn.functional.cross_entropy(z.double() @ head[0].T + head[1], labels)
    (entropy + head[0].square().sum() / (2 * C * len(z))).backward()
    return torch.cat([head[0].grad.flatten(), head[1].grad])


@pytest.mark.parametrize(
    ("d", "k"),
    [
        (8, 4),
        (8, 2),  # scikit-learn has another parameterisation for two classes
        (50, 50),  # too large for a Hessian
    ],
)
@pytest.mark.parametrize("C", [1.0, 1e4])
def test_converged_probe_is_at_the_minimum(d, k, C):
    z, labels = blobs(d=d, k=k, spread=3.0)
    probe = converged_probe(z, labels, C=C)
    assert probe.weight.shape == (k, d)
    assert gradient(probe, z, labels, C).abs().max() < 1e-5
    short = sgd_probes(z, labels, k, learning_rates=(0.1,), seeds=(0,))[0.1, 0]
    assert gradient(short, z, labels, C).abs().max() > 1e-3


def test_converged_probe_on_singular_features_beats_short_training():
    z, labels = blobs(spread=3.0)
    z = torch.cat([z, z[:, :3], torch.ones(len(z), 1)], dim=1)  # rank 8 of 12
    final = converged_probe(z, labels)
    short = sgd_probes(z, labels, 4, learning_rates=(0.001,), seeds=(0,))[0.001, 0]
    losses = [nn.functional.cross_entropy(probe(z), labels).item() for probe in (final, short)]
    assert losses[0] < 0.7 * losses[1]


def test_probe_scores_by_hand():
    probe = Probe(torch.eye(3), torch.zeros(3))
    answers = {"f": [0, 0, 1], "r": [1, 2], "ft": [0, 1], "rt": [1, 1, 2, 0]}
    features = {name: torch.eye(3)[rows] for name, rows in answers.items()}
    labels = {"f": [0, 0, 0], "r": [1, 2], "ft": [0, 0], "rt": [1, 1, 2, 2]}
    labels = {name: torch.tensor(values) for name, values in labels.items()}
    scores = probe_scores(probe, features, labels, forget=[0], targets=[1])
    assert scores["acc_f"] == pytest.approx(200 / 3)
    assert (scores["acc_r"], scores["acc_ft"], scores["acc_rt"]) == (100, 50, 75)
    # Against the rest, ft scores high, low; rt low, low, low, high: of eight pairs three are won, four tied.
    assert scores["auc_rest"] == pytest.approx(100 * (3 + 4 / 2) / 8)
    assert scores["auc_target"] == pytest.approx(100 * (2 + 2 / 2) / 4)
    assert np.isnan(probe_scores(probe, features, labels, forget=[0])["auc_target"])


# membership


def test_modified_entropy_against_a_loop():
    logits, labels = torch.randn(6, 3, generator=generator()), torch.tensor([0, 1, 2, 0, 1, 2])
    p = logits.double().softmax(1).numpy()
    for i, found in enumerate(modified_entropy(logits, labels)):
        y = int(labels[i])
        expected = -(1 - p[i, y]) * np.log(p[i, y]) - sum(
            p[i, j] * np.log(1 - p[i, j]) for j in range(3) if j != y
        )
        assert float(found) == pytest.approx(expected)
    sure = torch.tensor([[200.0, 0, 0]]).repeat(2, 1)
    assert torch.isfinite(modified_entropy(sure, torch.tensor([0, 1]))).all()
    assert torch.allclose(confidence(logits, labels), torch.tensor(p)[torch.arange(6), labels])
    assert torch.allclose(sample_losses(logits, labels), -torch.tensor(p)[torch.arange(6), labels].log())


def test_loss_attack_finds_members_and_only_members():
    low, high = torch.rand(400, generator=generator(1)), torch.rand(300, generator=generator(2)) + 0.8
    found = loss_attack(low, high)
    assert 80 < found["mia_loss_low"] < found["mia_loss"] < found["mia_loss_high"] <= 100
    assert found["mia_loss_auc"] == pytest.approx(
        100 * roc_auc_score(np.repeat([1, 0], [400, 300]), -torch.cat([low, high]))
    )
    nothing = loss_attack(low, torch.rand(300, generator=generator(3)))
    assert nothing["mia_loss_low"] < 50 < nothing["mia_loss_high"]
    assert loss_attack(low, high, seed=1) != found
    assert loss_attack(low, high) == found


def test_loss_attack_is_five_stratified_splits():
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    forget, unseen = torch.randn(80, generator=generator(0)), torch.randn(80, generator=generator(1)) + 1
    order = np.random.default_rng(0)
    sides = [np.asarray(side.double())[order.permutation(80)] for side in (forget, unseen)]
    x = np.concatenate(sides)[:, None]
    folds = StratifiedShuffleSplit(5, test_size=0.1, random_state=0)
    expected = cross_val_score(LogisticRegression(), x, np.repeat([1, 0], 80), cv=folds).mean()
    assert loss_attack(forget, unseen)["mia_loss"] == pytest.approx(100 * expected)


def test_shadow_attack_counts_non_members():
    seen = 0.9 + 0.1 * torch.rand(200, generator=generator(0))
    unseen = 0.6 * torch.rand(150, generator=generator(1))
    assert shadow_attack(seen, unseen, torch.full((50,), 0.95)) == 0
    assert shadow_attack(seen, unseen, torch.full((50,), 0.3)) == 100
    assert shadow_attack(seen, unseen, torch.tensor([0.95, 0.3, 0.3, 0.3])) == 75


# similarity


def test_class_means_and_cosines_by_hand():
    z, labels = torch.tensor([[2.0, 0], [4, 0], [0, 1], [0, 3]]), torch.tensor([0, 0, 1, 1])
    means = class_means(z, labels, 3)
    assert torch.equal(means, torch.tensor([[3.0, 0], [0, 2], [0, 0]]).double())
    after = means[[1, 1, 2]]  # class 0 was sent to class 1
    expected = torch.tensor([[0.0, 0, 0], [1, 1, 0], [0, 0, 0]]).double()
    assert torch.allclose(prototype_cosines(means, after), expected)


def test_linear_cka_is_the_kernel_form_and_has_its_invariances():
    X = torch.randn(40, 5, generator=generator(0)).double()
    Y = torch.randn(40, 7, generator=generator(1)).double()
    Y[:, :3] += X[:, :3]
    centre = torch.eye(40).double() - 1 / 40
    K, L = (centre @ Z @ Z.T @ centre for Z in (X, Y))
    assert linear_cka(X, Y) == pytest.approx(((K * L).sum() / (K.norm() * L.norm())).item())
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator(2)).double()).Q
    assert linear_cka(X, 3 * X @ rotation + 1) == pytest.approx(1)
    assert linear_cka(X, torch.ones(40, 2)) == 0
    assert 0.05 < linear_cka(X, Y) < 0.95
