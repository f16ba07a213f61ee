"""A second moment of fewer features than dimensions: the same edit as with the dense matrix, never made."""

import dataclasses

import pytest
import torch

from more_hf.core.prototypes import PrototypeFitter, ThinMoment
from more_hf.core.remap import Remap
from more_hf.core.routers import HashRouter


NAMES = ["gogh", "monet", "cat"]


def fitted(d, n, *, thin, batches=3, seed=0):
    """Prototypes of three names, and a second moment of `n` features of `d` numbers."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, d, generator=generator, dtype=torch.float64)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, d).double()
    fitter = PrototypeFitter(d, NAMES, thin=thin).update(means, torch.arange(3))
    for part in rows.chunk(batches):
        fitter.update_moment(part)
    return fitter.prototypes


@pytest.mark.parametrize("solver", ["covariance", "soft"])
@pytest.mark.parametrize(("d", "n"), [(48, 5), (300, 200), (300, 299)])
def test_the_dual_is_that_of_the_dense_moment(solver, d, n):
    thin, dense = fitted(d, n, thin=True), fitted(d, n, thin=False)
    assert isinstance(thin.second_moment, ThinMoment)
    assert thin.moment_count == dense.moment_count == n
    one, other = (Remap.fit(P, ["gogh"], [["monet"]], solver=solver) for P in (thin, dense))
    assert (one.dual - other.dual).norm() < 1e-12 * other.dual.norm()
    assert one.ordinary_moved == pytest.approx(other.ordinary_moved, rel=1e-10)
    assert one.verify() == pytest.approx(other.verify(), rel=1e-8, abs=1e-12)
    plain = Remap.fit(thin, ["gogh"], [["monet"]])
    assert (one.dual - plain.dual).norm() > 1e-2 * plain.dual.norm()  # Σ counts


def test_from_as_many_features_as_dimensions_on_it_is_the_dense_moment():
    thin, dense = fitted(20, 20, thin=True), fitted(20, 20, thin=False)
    assert torch.equal(thin.second_moment, dense.second_moment)  # bit for bit, whenever it became dense
    later = fitted(20, 90, thin=True, batches=9), fitted(20, 90, thin=False, batches=9)
    assert torch.equal(later[0].second_moment, later[1].second_moment)
    assert later[0].moment_count == 90


def test_no_matrix_of_d_by_d_is_made():
    """At this width one would take 20 GB."""
    prototypes = fitted(50_000, 20, thin=True)
    for solver in ("pinv", "covariance", "soft"):
        remap = Remap.fit(prototypes, ["gogh"], [["monet"], ["cat"]], solver=solver)
        assert remap.dual.shape == (3, 50_000)
        assert 0 < remap.ordinary_moved < 1
        assert remap.verify()["remain_fixed"] < 1e-8
    router = HashRouter(remap)
    assert router(prototypes.matrix.T[:, None].expand(-1, 2, -1)).shape == (3,)


def test_products_and_trace_are_those_of_the_matrix():
    moment = fitted(12, 7, thin=True).second_moment
    dense = moment.rows.T @ moment.rows / 7
    z = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(moment @ z, dense @ z, rtol=1e-12)
    assert torch.allclose(z.T @ moment, z.T @ dense, rtol=1e-12)
    assert torch.allclose(moment.trace(), dense.trace(), rtol=1e-12)


def test_without_shrinkage_a_thin_moment_is_singular():
    prototypes = fitted(48, 5, thin=True)
    with pytest.raises(Exception, match="singular.*larger `shrinkage`"):
        Remap.fit(prototypes, ["gogh"], [["monet"]], solver="covariance", shrinkage=0.0)
    zero = dataclasses.replace(prototypes, second_moment=None)
    with pytest.raises(Exception, match="needs a second moment"):
        Remap.fit(zero, ["gogh"], [["monet"]], solver="covariance")
