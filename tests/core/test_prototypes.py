"""Prototypes are plain means, however the data arrives."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from more_hf.core.errors import PrototypeError
from more_hf.core.prototypes import PrototypeFitter, Prototypes, Totals


NAMES = ("cat", "dog", "fox")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Sums of a few hundred float64 values of size 1 differ by their order by less than 300 * 2.2e-16.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def data(n=40, d=5, dtype=torch.float32, seed=0):
    """Features `(n, d)` that are not centred, and labels in which every prototype occurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(NAMES)
    return (torch.randn(n, d, generator=generator) + 3 + labels[:, None]).to(dtype), labels


def fit(*batches, d=5):
    fitter = PrototypeFitter(d, NAMES)
    for features, labels in batches:
        fitter.update(features, labels).update_moment(features)
    return fitter


def means(features, labels):
    """An independent reference, one prototype after the other."""
    return torch.stack([features[labels == i].double().mean(0) for i in range(len(NAMES))], dim=1)


def test_prototypes_are_the_means():
    features, labels = data()
    prototypes = fit((features, labels)).prototypes

    torch.testing.assert_close(prototypes.matrix, means(features, labels), **ROUNDING)
    assert prototypes.matrix.dtype == torch.float64
    assert prototypes.names == NAMES
    assert prototypes.counts.tolist() == [14, 13, 13]
    assert torch.equal(prototypes["dog"], prototypes.matrix[:, 1])
    assert not torch.equal(prototypes["dog"], prototypes["cat"])


@settings(derandomize=True, deadline=None, database=None, max_examples=50)
@given(
    n=st.integers(3, 60),
    d=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    shards=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_streaming_equals_one_shot(n, d, dtype, cuts, shards, seed):
    features, labels = data(n, d, dtype, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    batches = [order[a:b] for a, b in zip(edges, edges[1:], strict=False)]

    parts = []
    for shard in range(shards):
        parts.append(fit(*((features[rows], labels[rows]) for rows in batches[shard::shards]), d=d))
    whole = PrototypeFitter(d, NAMES)
    whole.totals = Totals(*map(sum, zip(*(part.totals for part in parts), strict=True)))
    one_shot, streamed = fit((features, labels), d=d).prototypes, whole.prototypes

    torch.testing.assert_close(streamed.matrix, one_shot.matrix, **ROUNDING)
    torch.testing.assert_close(streamed.second_moment, one_shot.second_moment, **ROUNDING)
    torch.testing.assert_close(streamed.matrix, means(features, labels), **ROUNDING)
    assert torch.equal(streamed.counts, one_shot.counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_float64_whatever_the_input(dtype):
    # 4096 ones after a 4096: a sum in float16 or bfloat16 would stop growing.
    features = torch.cat([torch.full((1, 1), 4096.0), torch.ones(4095, 1)]).to(dtype)
    fitter = PrototypeFitter(1, ["one"]).update(features, torch.zeros(4096, dtype=torch.int64))

    assert fitter.prototypes.matrix.item() == (4096 + 4095) / 4096


def test_tokens_are_features_of_their_own():
    features, labels = data(24)
    tokens = fit((features.reshape(4, 6, 5), labels.reshape(4, 6))).prototypes

    torch.testing.assert_close(tokens.matrix, means(features, labels), **ROUNDING)


def test_label_minus_one_is_left_out():
    features, labels = data()
    padded = torch.cat([features, torch.full((7, 5), 100.0)])
    left_out = torch.cat([labels, torch.full((7,), -1)])
    counted = torch.cat([labels, torch.full((7,), 1)])

    torch.testing.assert_close(fit((padded, left_out)).prototypes.matrix, means(features, labels), **ROUNDING)
    assert fit((padded, left_out)).prototypes.counts.sum() == len(features)
    assert (fit((padded, counted)).prototypes["dog"] - means(features, labels)[:, 1]).abs().max() > 1


def test_moment_is_the_uncentred_mean_of_outer_products():
    features, labels = data()
    prototypes = fit((features[:11], labels[:11]), (features[11:], labels[11:])).prototypes
    z = features.double()

    torch.testing.assert_close(prototypes.second_moment, torch.einsum("ni,nj->ij", z, z) / len(z), **ROUNDING)
    assert (prototypes.second_moment - z.T.cov(correction=0)).abs().max() > 1  # the mean is not taken off


def test_moment_and_means_are_separate():
    features, labels = data()
    assert PrototypeFitter(5, NAMES).update(features, labels).prototypes.second_moment is None

    fitter = PrototypeFitter(5, NAMES).update(features, labels)
    before = fitter.prototypes.matrix
    assert torch.equal(fitter.update_moment(features + 1).prototypes.matrix, before)


def test_prototypes_do_not_follow_the_fitter():
    features, labels = data()
    fitter = fit((features, labels))
    prototypes = fitter.prototypes
    kept = copy.deepcopy(prototypes)
    fitter.update(features + 10, labels).update_moment(features + 10)

    assert not torch.equal(fitter.prototypes.matrix, kept.matrix)
    for name in ("matrix", "counts", "second_moment"):
        assert torch.equal(getattr(prototypes, name), getattr(kept, name))


def test_empty_prototypes_are_named():
    features, labels = data()
    labels[labels == 1] = -1

    with pytest.raises(PrototypeError, match="'dog'") as error:
        fit((features, labels)).prototypes  # noqa: B018
    assert "'cat'" not in str(error.value)


def test_duplicate_names_are_refused():
    with pytest.raises(PrototypeError, match="unique"):
        PrototypeFitter(5, ["cat", "dog", "cat"])


def test_unknown_name_lists_the_known():
    with pytest.raises(PrototypeError, match="'cow'"):
        fit(data()).prototypes["cow"]


def test_inputs_and_random_state_are_left_alone():
    features, labels = data(dtype=torch.float64)
    features.requires_grad_()
    kept, kept_labels, state = features.detach().clone(), labels.clone(), torch.get_rng_state()
    prototypes = fit((features, labels)).prototypes

    assert torch.equal(features, kept)
    assert torch.equal(labels, kept_labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert features.requires_grad
    assert not prototypes.matrix.requires_grad


@pytest.mark.parametrize("moment", [False, True])
def test_save_and_load_bit_for_bit(tmp_path, moment):
    features, labels = data()
    fitter = PrototypeFitter(5, NAMES).update(features, labels)
    prototypes = (fitter.update_moment(features) if moment else fitter).prototypes
    prototypes.save(tmp_path / "prototypes.safetensors")
    loaded = Prototypes.load(tmp_path / "prototypes.safetensors")

    assert torch.equal(loaded.matrix, prototypes.matrix)
    assert torch.equal(loaded.counts, prototypes.counts)
    assert (loaded.names, loaded.moment_count) == (NAMES, 40 if moment else 0)
    assert (loaded.second_moment is None) == (not moment)
    assert not moment or torch.equal(loaded.second_moment, prototypes.second_moment)


def test_memory_is_of_the_means_unless_the_moment_is_fed():
    fitter = PrototypeFitter(5000, NAMES).update(torch.ones(3, 5000), torch.arange(3))
    assert fitter.totals.moment.numel() == 1
    assert PrototypeFitter(5, NAMES).update_moment(torch.ones(3, 5)).totals.moment.shape == (5, 5)
