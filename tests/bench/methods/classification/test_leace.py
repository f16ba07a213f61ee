"""LEACE, against the rest and against one class."""

import copy

import pytest
import torch
from support.squares import head_inputs

from more_hf.core.errors import MoreError
from more_hf_bench.methods.registry import CLASSIFICATION


def test_leace_target_equalises_two_means_and_leaves_no_correlation(model, splits):
    edited = CLASSIFICATION["leace-target"].load()(copy.deepcopy(model), splits, target=3)
    target = splits.r.subset(splits.r.labels == 3)
    f, t = head_inputs(edited, splits.f), head_inputs(edited, target)
    gap_before = (head_inputs(model, splits.f).mean(0) - head_inputs(model, target).mean(0)).norm()
    assert (f.mean(0) - t.mean(0)).norm() < 1e-4 * gap_before
    with pytest.raises(MoreError, match=r"Class 2 is not among the remaining classes \[0, 1, 3\]"):
        CLASSIFICATION["leace-target"].load()(model, splits, target=2)
    with pytest.raises(MoreError, match="Unknown contrast 'all'"):
        CLASSIFICATION["leace-rest"].load()(model, splits, against="all")


def test_leace_rest_is_the_least_squares_map(model, splits):
    """Against the theorem: x − W⁺ Q W (x − mean) with W = Σ^(−1/2), from the full covariance."""
    parts = (splits.f, splits.r)
    X = torch.cat([head_inputs(model, part) for part in parts])
    z = torch.cat([torch.ones(len(splits.f)), torch.zeros(len(splits.r))]).double()
    edited = CLASSIFICATION["leace-rest"].load()(copy.deepcopy(model), splits)
    after = torch.cat([head_inputs(edited, part) for part in parts])
    assert (after.mean(0) - X.mean(0)).norm() < 1e-4 * X.mean(0).norm()  # the mean stays
    covariance = (after - after.mean(0)).T @ (z - z.mean())
    covariance_before = (X - X.mean(0)).T @ (z - z.mean())
    assert covariance.norm() < 1e-4 * covariance_before.norm()  # and nothing linear tells f
    assert torch.linalg.matrix_rank(after - X, rtol=1e-4) == 1
