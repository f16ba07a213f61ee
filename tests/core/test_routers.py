"""Which expert a sample takes: draws that depend on seed and call alone, hashes that repeat themselves."""

import pytest
import torch

from more_hf.core.errors import PrototypeError
from more_hf.core.prototypes import Prototypes
from more_hf.core.remap import Remap
from more_hf.core.routers import ROUTERS, HashRouter, PrototypeRouter, RandomPrototypeRouter, RandomRouter


def make_remap(num_experts=4, d=24, num_prototypes=10, solver="pinv", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    P = torch.randn(d, num_prototypes, dtype=dtype, generator=generator)
    features = torch.randn(500, d, dtype=dtype, generator=generator)
    names = tuple(f"p{i}" for i in range(num_prototypes))
    prototypes = Prototypes(P, names, torch.ones(num_prototypes), features.T @ features / len(features))
    targets = [[f"p{2 + e}", f"p{2 + (e + 1) % num_experts}"] for e in range(num_experts)]
    return Remap.fit(prototypes, ["p0", "p1"], targets, solver=solver)


def random_router(seeds=None, num_experts=4):
    router = RandomRouter(make_remap(num_experts))
    router.reset(seeds)
    return router


def features(n, d=24, seed=1):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chi_square(counts):
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_routers_by_name():
    assert list(ROUTERS) == ["random", "hash", "prototype", "prototype_random"]
    assert list(ROUTERS.values()) == [RandomRouter, HashRouter, PrototypeRouter, RandomPrototypeRouter]


# The bounds below are the 99.9 % quantiles of chi-square with 4 and 24 degrees of freedom.


def test_random_is_uniform_over_seeds_and_over_calls():
    router = random_router(range(5000), num_experts=5)
    assert chi_square(torch.bincount(router(features(5000)), minlength=5)) < 18.5

    router = random_router([7], num_experts=5)
    draws = torch.cat([router(features(1)) for _ in range(2000)])
    assert chi_square(torch.bincount(draws, minlength=5)) < 18.5


def test_random_draws_of_neighbouring_calls_and_seeds_are_independent():
    router = random_router(range(10000), num_experts=5)
    first, second = router(features(10000)), router(features(10000))

    assert chi_square(torch.bincount(first * 5 + second, minlength=25)) < 51.2
    assert chi_square(torch.bincount(first[:-1] * 5 + first[1:], minlength=25)) < 51.2


def test_random_is_a_function_of_seed_and_call():
    seeds = [3, 1, 4, 15, 9, 2, 6, 5]
    router, other = random_router(seeds), random_router(seeds)
    draws = torch.stack([router(features(8, seed=call)) for call in range(20)])

    assert torch.equal(draws, torch.stack([other(features(8)) for _ in range(20)]))
    router.reset(seeds)
    assert torch.equal(draws, torch.stack([router(features(8)) for _ in range(20)]))


def test_random_depends_on_seed_and_on_call():
    router = random_router(range(64))
    first, second = router(features(64)), router(features(64))
    router.reset(range(64, 128))

    assert not torch.equal(first, second)
    assert not torch.equal(first, router(features(64)))
    assert len(first.unique()) == 4


def test_random_is_independent_of_batch_size_and_row_order():
    seeds = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:32].tolist()
    together = random_router(seeds)
    draws = torch.stack([together(features(32)) for _ in range(5)])
    backwards = random_router(seeds[::-1])
    assert torch.equal(draws.flip(1), torch.stack([backwards(features(32)) for _ in range(5)]))
    assert not torch.equal(draws, draws.flip(1))

    for row in (0, 13, 31):
        alone = random_router([seeds[row]])
        assert torch.equal(draws[:, row], torch.cat([alone(features(1)) for _ in range(5)]))


def test_random_rows_beyond_the_seeds_repeat_them():
    draws = random_router(range(16))(features(32))

    assert torch.equal(draws[:16], draws[16:])
    assert len(draws[:16].unique()) > 1


def test_random_without_seeds_rows_and_routers_differ():
    router, other = random_router(), random_router()
    draws = router(features(64))

    # 64 draws of 4 experts agree by chance with probability 4 ** -63.
    assert len(draws.unique()) > 1
    assert not torch.equal(draws, other(features(64)))
    assert not torch.equal(draws, router(features(64)))


@pytest.mark.parametrize("shape", [(6, 24), (6, 7, 24)])
@pytest.mark.parametrize("name", ROUTERS)
def test_one_expert_per_sample(name, shape):
    router = ROUTERS[name](make_remap())
    router.reset(range(6))
    experts = router(torch.randn(shape, generator=torch.Generator().manual_seed(0)))

    assert experts.shape == (6,)
    assert experts.dtype == torch.int64
    assert ((experts >= 0) & (experts < 4)).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_a_single_expert_is_always_taken(name):
    assert ROUTERS[name](make_remap(num_experts=1))(features(32)).eq(0).all()


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_leave_input_and_random_state_alone(name):
    z, state = features(8), torch.get_rng_state()
    router = ROUTERS[name](make_remap())
    router.reset([1, 2])
    router(z)

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z, features(8))


def test_random_draws_the_same_when_compiled():
    torch.compiler.reset()
    eager, compiled = random_router(range(8)), random_router(range(8))
    function = torch.compile(lambda z: z + compiled(z)[:, None], backend="eager", fullgraph=True)
    z = features(8)
    expected = [z + eager(z)[:, None] for _ in range(4)]

    assert all(torch.equal(function(z), e) for e in expected)
    assert not torch.equal(expected[0], expected[1])
    compiled.reset(range(8))
    assert torch.equal(function(z), expected[0])


def test_hash_draws_the_same_when_compiled():
    torch.compiler.reset()
    router, z = HashRouter(make_remap()), features(16)

    assert torch.equal(torch.compile(router.__call__, backend="eager", fullgraph=True)(z), router(z))
    assert len(router(z).unique()) > 1


@pytest.mark.parametrize("solver", ["pinv", "covariance"])
@pytest.mark.parametrize("tokens", [None, 5])
def test_hash_is_what_no_expert_changes(solver, tokens):
    remap = make_remap(solver=solver)
    router = HashRouter(remap)
    z = features(64) if tokens is None else features(64 * tokens).reshape(64, tokens, 24)
    experts = router(z)

    assert torch.equal(router(z), experts)
    assert torch.equal(HashRouter(remap)(z), experts)
    for expert in [*range(4), experts, None]:
        edited = remap.apply(z, expert)
        assert (edited - z).abs().max() > 0.1
        assert torch.equal(router(edited), experts)
    assert not torch.equal(router(z.flip(0)), experts)


def test_hash_spreads_over_the_experts():
    counts = torch.bincount(HashRouter(make_remap())(features(4000)), minlength=4)

    assert counts.min() > 400  # the directions are fixed, so the shares are uneven, but no expert is left out


def test_hash_falls_back_to_expert_0_at_prototypes():
    remap = make_remap()
    P = remap.prototypes.matrix.T
    router, away = HashRouter(remap), features(10)

    assert router(P).eq(0).all()
    assert router(P + 1e-6 * away).eq(0).all()
    assert not router(P + away).eq(0).all()


def test_hash_needs_something_that_no_expert_changes():
    with pytest.raises(PrototypeError, match="10 dimensions"):
        HashRouter(make_remap(d=10, num_prototypes=10))
    assert not HashRouter(make_remap(d=11, num_prototypes=10))(features(64, d=11)).eq(0).all()


def test_hash_ignores_the_first_token():
    router = HashRouter(make_remap())
    z = features(32 * 5).reshape(32, 5, 24)
    first, second = z.clone(), z.clone()
    first[:, 0] += 100 * features(32, seed=2)
    second[:, 1] += 100 * features(32, seed=2)

    assert torch.equal(router(first), router(z))
    assert not torch.equal(router(second), router(z))


# Prototype routers (Algorithm 4)


def test_prototype_router_takes_the_largest_response_of_the_remain_pseudo_inverse():
    remap = make_remap(num_experts=4)
    router, z = PrototypeRouter(remap), features(200)
    remain = remap.prototypes.matrix[:, 2:]  # p0 and p1 are forgotten
    coordinates = torch.linalg.lstsq(remain, z.T).solution  # (8, 200): another way to P_R⁺ z

    experts = router(z)
    assert torch.equal(experts, coordinates[:4].argmax(0))
    assert len(experts.unique()) == 4
    # each of the first remain prototypes goes to its own expert
    assert torch.equal(router(remain.T[:4]), torch.arange(4))
    router.reset([1, 2])
    assert torch.equal(router(z), experts)  # which no seed changes


def test_prototype_router_reads_the_mean_of_the_content_tokens():
    router = PrototypeRouter(make_remap())
    tokens = features(40 * 5).reshape(40, 5, 24)
    assert torch.equal(router(tokens), router(tokens[:, 1:].mean(1)))
    assert not torch.equal(router(tokens), router(tokens.mean(1)))


def test_more_experts_than_remain_prototypes_leave_some_unused():
    P = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prototypes = Prototypes(P, tuple("abcde"), torch.ones(5))
    router = PrototypeRouter(Remap.fit(prototypes, ["a"], [[name] for name in "bcdebcde"]))

    assert router.weight.shape == (4, 24)
    assert sorted(router(features(300)).unique().tolist()) == [0, 1, 2, 3]


def test_random_prototype_router_is_drawn_once_from_a_narrow_normal():
    remap = make_remap(num_experts=8, d=200, num_prototypes=12)
    router = RandomPrototypeRouter(remap)

    assert router.weight.shape == (8, 200)
    assert router.weight.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(router.weight.mean().item()) < 0.01
    assert torch.equal(router.weight, RandomPrototypeRouter(remap).weight)
    z = features(100, d=200)
    assert torch.equal(router(z), (z.float() @ router.weight.T).argmax(1))
    assert not torch.equal(router(z), PrototypeRouter(remap)(z))
