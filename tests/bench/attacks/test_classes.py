"""The attacks on classifiers: each succeeds on what it must break, and says so of what it does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from more_hf.data import load_classifier
from more_hf_bench.attacks.classes.features import block_features, layers, probes, ridge, similarity
from more_hf_bench.attacks.classes.membership import likelihood_ratio, log_odds, membership
from more_hf_bench.attacks.classes.queries import jitter, queries
from more_hf_bench.attacks.classes.run import Victims, random_weights
from more_hf_bench.attacks.classes.shots import few_shot_rows, fine_tuning, shots
from more_hf_bench.attacks.classes.victim import AUC_TARGET, REMAINING, Seen
from more_hf_bench.attacks.store import AUC, RECOGNISED
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, invert_two_queries
from more_hf_bench.classes.heads import fit_perceptron, linear_head
from more_hf_bench.classes.metrics import auc
from more_hf_bench.classes.run import settings_of
from more_hf_bench.classes.training import Recipe, train_classifier
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.run import Cell
from more_hf_bench.splits import some_of_each


pytestmark = pytest.mark.slow

MODEL, FORGET, CLASS = "digits-allcnn", "3", 3
METHODS = ("erase", "remap", "more", "more-hash")
CHANCE = pytest.approx(50, abs=8)


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    data = load_kd_data("digits")
    functions = {name: CLASSIFICATION[name].load() for name in METHODS}
    functions["more-reloaded"] = functions["more"]
    settings = settings_of(functions, {}, {}, {})
    folder, recipe = tmp_path_factory.mktemp("models"), Recipe.of(data, epochs=3)
    models = {MODEL: load_classifier(MODEL)}
    make = Victims(data, models, functions, settings, {FORGET: (CLASS,)}, None, recipe, folder)
    made = {}

    def victim(method):
        if method not in made:
            made[method] = make(Cell(method, FORGET, Path(), model=MODEL))
        return made[method]

    return victim


def found(results, variant="", measure=RECOGNISED, budget=None):
    """The one number of that kind, or the one at a budget."""
    kept = [r for r in results if (r.variant, r.measure) == (variant, measure)]
    (result,) = kept if budget is None else [r for r in kept if r.budget == budget]
    return result.recovered


@pytest.mark.parametrize(
    ("attack", "variant", "budget"),
    [
        *((probes, shape, None) for shape in ("linear, the paper's", "linear, converged", "k-NN")),
        *((probes, shape, None) for shape in ("perceptron", "QDA")),
        (queries, "mean", 1),
        (queries, "two, unknown experts", None),
        (jitter, "mean", 8),
        (shots, "class mean", 50),
        (shots, "head", 50),
        (layers, "after a block", 8),
        (layers, "without the hook", None),
        (ridge, "ridge map", 1),
    ],
)
def test_every_attack_succeeds_on_the_original(attack, variant, budget, victims):
    assert found(list(attack(victims("original"))), variant, budget=budget) > 85


def test_averaging_and_two_queries_break_random_routing(victims):
    random, merged = list(queries(victims("more"))), list(queries(victims("remap")))
    assert found(random, "mean", budget=1) < 30
    assert found(random, "mean", budget=64) > 85
    assert found(random, "mean", AUC, budget=64) > 97
    assert found(random, "two, known experts", AUC) > 95
    assert found(random, "disagreement", AUC, budget=16) > 97
    # Asking again gains nothing where nothing is drawn.
    assert found(merged, "mean", AUC_TARGET, budget=64) == found(merged, "mean", AUC_TARGET, budget=1)
    assert found(merged, "mean", AUC_TARGET, budget=64) == CHANCE
    assert found(merged, "disagreement", AUC, budget=64) == 50


def test_two_known_experts_determine_the_feature(victims):
    victim = victims("more")
    a, b = (victim.cached.experts("test", draw=draw) for draw in (0, 1))
    before, answer = victim.original.cached.inputs["test"], victim.cached.features("test")
    inverted = invert_two_queries(victim.cached, "test")
    torch.testing.assert_close(inverted[a != b], before[a != b], rtol=1e-3, atol=1e-3)
    # One expert alone has lost a direction; and the answers were not the feature.
    lost = (a == b) & victim.forgotten("test")
    assert lost.any()
    assert not torch.allclose(inverted[lost], before[lost], atol=0.1)
    assert not torch.allclose(answer[victim.forgotten("test")], before[victim.forgotten("test")], atol=0.1)


def test_what_is_erased_without_a_target_stays_separable(victims):
    erased, remapped = list(probes(victims("erase"))), list(probes(victims("remap")))
    assert found(erased, "linear, converged") > 85
    assert found(erased, "linear, one against rest", AUC) > 97
    assert found(remapped, "linear, converged", AUC_TARGET) == CHANCE


def test_nearest_neighbours_break_what_a_linear_head_does_not(victims):
    results = list(probes(victims("remap")))
    for shape in ("linear, converged", "linear, one against rest"):
        assert found(results, shape, AUC_TARGET) < 60
    for shape in ("k-NN", "perceptron", "QDA"):
        assert found(results, shape, AUC_TARGET) > 90
    routed = list(probes(victims("more")))
    assert found(routed, "linear, converged", AUC) == CHANCE
    assert found(routed, "k-NN", AUC) > 80


def test_a_reloaded_classifier_has_the_features_of_the_original(victims):
    reloaded, running, original = victims("more-reloaded"), victims("more"), victims("original")
    for part in ("train", "test"):
        assert torch.equal(reloaded.cached.features(part), original.cached.features(part))
        assert not torch.allclose(running.cached.features(part), original.cached.features(part), atol=0.1)
    # It forgets at its head alone.
    head = reloaded.cached.logits("test").argmax(-1)[reloaded.forgotten("test")]
    assert (head == CLASS).float().mean() < 0.1
    probed = (list(probes(victim)) for victim in (reloaded, original))
    one, other = ([r.recovered for r in results if r.measure == RECOGNISED] for results in probed)
    assert one == other


def test_a_tie_is_shared_and_not_won(victims):
    """A remap makes two classes one: a head gives both the same score, whichever rounding puts first."""
    results = list(queries(victims("remap"), asked=(1,)))
    assert found(results, "mean") == pytest.approx(50, abs=5)
    victim = victims("remap")
    logits = torch.zeros(len(victim.labels("test")), 10)
    assert [r.recovered for r in victim.scores(logits)][:2] == pytest.approx([10, 10])


def test_few_shots_are_few(victims):
    victim = victims("erase")
    labels = victim.labels("train")
    for count in (0, 5):
        rows = few_shot_rows(victim, count)
        assert int((labels[rows] == CLASS).sum()) == count
        assert len(rows) == count + int((labels != CLASS).sum())
    results = list(shots(victim))
    assert found(results, "class mean", budget=5) > 80
    assert found(results, "head", budget=50) > 60 > found(results, "head", budget=1)


def test_fine_tuning_teaches_the_class_again_and_leaves_the_victim_as_it_was(victims):
    victim = victims("remap")
    before = {name: tensor.clone() for name, tensor in victim.cached.model.state_dict().items()}
    features = victim.cached.features("test")
    results = list(fine_tuning(victim, counts=(0, 20), steps=(0, 20, 40), batch_size=32))
    for variant in ("edit kept", "edit removed"):
        assert found(results, f"{variant}, 20 images", budget=0) < 30
        assert found(results, f"{variant}, 20 images", budget=40) > 60
        assert found(results, f"{variant}, 0 images", budget=40) < 10  # remaining images alone
        assert found(results, f"{variant}, 20 images", measure=REMAINING) > 90
        assert found(results, f"{variant}, 20 images", measure="steps to 50%") in (20, 40)
        assert found(results, f"{variant}, 0 images", measure="steps to 50%") is None
    for name, tensor in victim.cached.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(victim.cached.features("test"), features)  # the hook is where it was
    untouched = list(fine_tuning(victims("original"), counts=(0,), steps=(0,)))
    assert found(untouched, "edit kept, 0 images", budget=0) > 90


def test_the_layers_before_the_edit_know_everything(victims):
    remapped, random = list(layers(victims("remap"))), list(layers(victims("random-weights")))
    assert found(remapped, "without the hook") > 85 > found(random, "without the hook")
    # Another head, on the mean of what the fourth block returns.
    victim = victims("remap")
    seen = []
    block = victim.cached.model.features[3]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(output.mean((2, 3))))
    with torch.no_grad():
        victim.cached.model(victim.parts["test"][torch.arange(50)]["pixel_values"])
    handle.remove()
    torch.testing.assert_close(block_features(victim.seen, victim.parts)[3]["test"][:50], seen[0])


def test_a_ridge_map_finds_only_what_is_still_there(victims):
    averaged, merged = list(ridge(victims("more"))), list(ridge(victims("remap")))
    assert found(averaged, "ridge map", AUC, budget=16) > 90 > found(averaged, "ridge map", AUC, budget=1)
    assert found(merged, "ridge map", AUC, budget=16) < 80
    assert found(list(ridge(victims("erase"))), "ridge map", budget=1) > 85


def test_the_difference_index_is_one_for_the_original_and_zero_for_retrain(victims):
    of = ("original", "retrain", "more")
    original, retrained, routed = (list(similarity(victims(method))) for method in of)
    assert found(original, "IDI", "idi") == 1
    assert found(retrained, "IDI", "idi") == 0
    # The blocks before the edit are the original's: less is left only in what the head reads.
    assert 0.5 < found(routed, "IDI", "idi") < 1
    assert found(routed, "information", "bits") < 0.2 < found(original, "information", "bits")
    assert found(retrained, "CKA, forgotten", "cka") == pytest.approx(1)
    assert found(routed, "CKA, forgotten", "cka") < 0.9
    # Where Retrain knows as much as the original, there is no difference to be a part of.
    same = replace(victims("original"), retrained=Seen(victims("original").cached))
    assert found(list(similarity(same)), "IDI", "idi") is None
    assert not list(similarity(replace(same, retrained=None)))


def test_shifted_copies_are_played_against_each_other(victims):
    hashed = list(jitter(victims("more-hash")))
    assert found(hashed, "mean", AUC, budget=8) > found(hashed, "mean", AUC, budget=1) + 3


def test_the_heads_are_what_they_are_called():
    """On an exclusive or, which no line separates; and beside another implementation."""
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    crossed, straight = (z[:, 0] * z[:, 1] > 0).long(), (z[:, 0] > z[:, 1]).long()
    net = fit_perceptron(lambda epoch: z, crossed, 2, hidden=64, epochs=20, seed=0)
    assert (net(z).argmax(-1) == crossed).float().mean() > 0.95
    assert ((linear_head(z, crossed, z) > 0).long() == crossed).float().mean() < 0.6
    line = torch.from_numpy(LogisticRegression().fit(z, straight).predict(z))
    assert ((linear_head(z, straight, z) > 0).long() == line).float().mean() > 0.98
    state = torch.random.get_rng_state()
    fit_perceptron(lambda epoch: z, crossed, 2, hidden=4, epochs=1, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shadow_models_tell_members_of_a_class_that_was_learned_by_heart(victims, tmp_path):
    """Few images, seen often: the gap between seen and unseen is wide. The control has seen none of them."""
    original, data = victims("original"), load_kd_data("digits")
    pool = data.train.subset(some_of_each(data.train.labels, 60))
    third = some_of_each(pool.labels, 20)
    others = torch.ones(len(pool), dtype=torch.bool).scatter(0, third, value=False).nonzero()[:, 0]
    second = others[some_of_each(pool.labels[others], 20)]
    rest = others[~torch.isin(others, second)]
    parts = {"train": pool.subset(third), "test": pool.subset(second)}
    recipe = replace(Recipe.of(data, epochs=30), shift=0, flip=False)

    def train(images, folder, seed):
        start = random_weights(original.cached.model, seed)
        return train_classifier(start, images, replace(recipe, seed=seed), output=tmp_path / folder)

    def attacked(images, folder):
        model = train(images, folder, 99)
        seen = {
            "seen": Seen(cache(model, model.classifier, parts)),
            "original": Seen(original.cached, memory),
        }
        victim = replace(original, **seen, parts=parts, forget=range(10), train=train)
        return found(list(membership(victim, shadows=8)), "LiRA", "auc_members")

    memory = {}
    assert attacked(parts["train"], "member") > 60
    assert attacked(pool.subset(rest), "stranger") == CHANCE
    assert not list(membership(replace(original, train=None)))


def test_the_likelihood_ratio_is_that_of_two_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    inside = torch.arange(64)[:, None] % 2 == torch.arange(4000) % 2
    confidences = torch.randn(64, 4000, generator=generator, dtype=torch.float64) + 3 * inside
    is_member = torch.arange(4000) < 2000
    observed = torch.randn(4000, generator=generator, dtype=torch.float64) + 3 * is_member
    score = likelihood_ratio(observed, confidences, inside)
    assert auc(score[is_member], score[~is_member]) == pytest.approx(98.3, abs=0.7)  # Φ(3/√2)
    assert (score - (3 * observed - 4.5)).abs().mean() < 0.6  # 32 models in and 32 out for each mean
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    p = logits.double().softmax(-1)[0, 0]
    torch.testing.assert_close(log_odds(logits, torch.tensor([0]))[0], (p / (1 - p)).log())
