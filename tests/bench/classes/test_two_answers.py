"""Two answers of known experts give the feature away, as the pseudo-inverse of both experts does."""

import pytest
import torch

from more_hf.core.moment import Moment
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf_bench.classes.features import explain_two_answers


NAMES = tuple("abcdefgh")
# The first two share a target of "b"; the last sends all to one place: two directions are lost.
TARGETS = [["d", "e", "f"], ["g", "e", "h"], ["f", "d", "g"], ["h", "h", "h"]]


def features(count, seed):
    return torch.randn(count, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


@pytest.mark.parametrize("solver", ["pinv", "covariance", "soft"])
def test_it_is_the_pseudo_inverse_of_both_experts(solver):
    prototypes = Prototypes(features(8, 0).T, NAMES, torch.ones(8))
    prototypes = prototypes.with_moment(Moment(features(100, 1).T @ features(100, 1), 100))
    remap = Remap.fit(prototypes, ["a", "b", "c"], TARGETS, solver=solver)
    experts = torch.eye(20, dtype=torch.float64) + remap.shifts @ remap.D_F
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    z = features(16, 2)
    z_a, z_b = ((experts[pairs[:, i]] @ z[..., None])[..., 0] for i in (0, 1))
    found = explain_two_answers(remap, z_a, z_b, *pairs.T)

    both = torch.cat([experts[pairs[:, 0]], experts[pairs[:, 1]]], dim=1)
    shortest = torch.linalg.pinv(both, rtol=1e-9) @ torch.cat([z_a, z_b], dim=1)[..., None]
    torch.testing.assert_close(found, shortest[..., 0], rtol=1e-6, atol=1e-6)
    # Experts that share no target give the feature itself, one expert alone does not, unless it is soft.
    apart = (pairs == torch.tensor([0, 2])).all(1)
    torch.testing.assert_close(found[apart], z[apart], rtol=1e-6, atol=1e-6)
    alone = pairs[:, 0] == pairs[:, 1]
    assert torch.allclose(found[alone], z[alone], atol=1e-3) == (solver == "soft")
