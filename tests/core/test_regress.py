"""`Remap.regress` against least squares over the features themselves."""

import pytest
import torch

import more_hf
from more_hf.core.moment import Moment
from more_hf.core.prototypes import PrototypeFitter
from more_hf.core.remap import Remap


WIDTH, ROWS = 6, 40
NAMES = ["cat", "dog", "fox", "wolf"]


def drawn(seed, *shift, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) + torch.tensor(shift).double()


@pytest.fixture(scope="module")
def features():
    """Of two forgotten names, of their targets, and ordinary ones."""
    middles = [(2, 0, 0, 1, 0, 0), (0, 2, 0, 1, 0, 0), (0, 0, 2, 1, 0, 0), (0, 0, 0, 1, 2, 0)]
    named = {name: drawn(i, *middle) for i, (name, middle) in enumerate(zip(NAMES, middles, strict=True))}
    return named, drawn(9, 0, 0, 0, 1, 0, 1, rows=3 * ROWS)


def fitted(features, targets=(("fox", "wolf"),), shrinkage=0.0, softness=1.0):
    named, ordinary = features
    fitter = PrototypeFitter(WIDTH, NAMES)
    for i, z in enumerate(named.values()):
        fitter.update(z, torch.full((len(z),), i))
    own = torch.cat([named["cat"], named["dog"]])
    moment = Moment(own.T @ own / len(own), len(own))
    prototypes = fitter.update_moment(ordinary).prototypes
    return Remap.regress(prototypes, ["cat", "dog"], targets, moment, shrinkage=shrinkage, softness=softness)


def least_squares(features, softness=1.0):
    """E of one row-by-row problem: forgotten features want to make a step, ordinary ones to stay."""
    named, ordinary = features
    staying = ordinary * (softness / len(ordinary)) ** 0.5
    rows, wanted = [staying], [staying]
    for name, target in (("cat", "fox"), ("dog", "wolf")):
        z, weight = named[name], (1 / (2 * ROWS)) ** 0.5
        rows.append(weight * z)
        wanted.append(weight * (z + named[target].mean(0) - named[name].mean(0)))
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.T


def test_it_is_the_least_squares_over_all_features(features):
    expected, identity = least_squares(features), torch.eye(WIDTH).double()
    torch.testing.assert_close(fitted(features).apply(identity).T, expected)
    assert (expected - identity).norm() > 0.5
    assert (fitted(features, shrinkage=0.5).apply(identity).T - expected).norm() > 0.01


@pytest.mark.parametrize("softness", [0.25, 4.0])
def test_softness_weighs_ordinary_features(features, softness):
    expected, identity = least_squares(features, softness), torch.eye(WIDTH).double()
    remap = fitted(features, softness=softness)
    torch.testing.assert_close(remap.apply(identity).T, expected)
    # the softer, the less anything moves
    moved = [(fitted(features, softness=s).apply(identity).T - identity).norm() for s in (0.25, 1.0, 4.0)]
    assert moved[0] > 1.2 * moved[1] > 1.2**2 * moved[2]


def test_forgotten_features_move_more_than_ordinary_ones(features):
    remap, (named, ordinary) = fitted(features), features
    means = {name: z.mean(0) for name, z in named.items()}
    steps = {"cat": means["fox"] - means["cat"], "dog": means["wolf"] - means["dog"]}
    for name, step in steps.items():
        moved = (remap.apply(named[name]) - named[name]).mean(0)
        assert 0.4 < moved @ step / (step @ step) < 1
    # ordinary ones scatter as widely here, and on average they stay
    assert (remap.apply(ordinary) - ordinary).mean(0).norm() < 0.1 * steps["cat"].norm()


def test_it_is_a_lora_of_the_rank_of_the_forgotten(features):
    remap, weight = fitted(features), drawn(5, *[0] * WIDTH)
    lora_A, lora_B = remap.delta(weight)
    assert lora_A.shape == (2, WIDTH)
    torch.testing.assert_close(weight + lora_B @ lora_A, remap.merged(weight))
    torch.testing.assert_close(remap.merged(weight), weight @ least_squares(features))


def test_what_is_measured_is_what_it_promises(features):
    measured = fitted(features).verify()
    assert 0 < measured["way_left"] < 1
    assert measured["targets_moved"] > 0  # nothing is held
    assert not {"forget_to_target", "idempotent", "nothing_left"} & measured.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shrinkage": -1.0}, "shrinkage"),
        ({"targets": (("fox",),)}, "Each expert needs"),
        ({"targets": (("fox", "bat"),)}, "bat"),
    ],
)
def test_wrong_arguments(features, arguments, message):
    with pytest.raises(more_hf.PrototypeError, match=message):
        fitted(features, **arguments)
