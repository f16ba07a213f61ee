"""Gates: the reader, the threshold, and the two hidden units that compute them in a layer's own weights."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn.functional import pad

from more_hf.core.errors import SiteNotFoundError
from more_hf.core.gate import SHARPNESS, Gate, fit_reader, written
from more_hf.core.moment import Moment
from more_hf.core.proof import Measurements
from more_hf.core.site import AffineSite, Site, check_unshared


FRONT, BEHIND = "net.0.proj", "net.2"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(x):
    """Of features `(n, d)` with a 1 behind each."""
    x = pad(x, (0, 1), value=1)
    return Moment(x.T @ x / len(x), len(x))


def gate_of(width, out, seed):
    return Gate(normal(width, seed=seed), 0.3, 0.7, normal(out, seed=seed + 1))


def test_a_gate_is_shut_on_others_and_reads_along_the_discriminant():
    mixing, apart = normal(5, 5, seed=1), normal(5, seed=3)
    others, own = normal(12000, 5, seed=5) @ mixing + 2, normal(1200, 5, seed=2) @ mixing + 2 + 4 * apart
    reader, scale = fit_reader(moment(own), moment(others[::2]), shrinkage=0)
    expected = torch.linalg.solve(mixing.T @ mixing, apart)
    assert torch.cosine_similarity(reader, expected, dim=0) > 0.99
    assert scale == pytest.approx(float((own @ reader).std()), rel=1e-3)
    gate = Gate.shut_at(0.99, others[1::2] @ reader, reader, scale, apart)
    new = normal(12000, 5, seed=4) @ mixing + 2
    assert float((gate(new) > 0).double().mean()) == pytest.approx(0.01, abs=3e-3)
    assert float((gate(own) > 0).double().mean()) > 0.5


def test_a_reader_of_few_features_reads_new_ones_better_with_shrinkage():
    width = 60
    apart = 0.5 * torch.eye(width, dtype=torch.float64)[0]
    others, own = normal(60, width), normal(40, width, seed=1) + apart
    new_others, new = normal(4000, width, seed=2), normal(4000, width, seed=3) + apart
    opened = {}
    for shrinkage in (0.0, 0.2):
        reader, scale = fit_reader(moment(own), moment(others), shrinkage)
        gate = Gate.shut_at(0.99, new_others @ reader, reader, scale, apart)
        opened[shrinkage] = float((gate(new) > 0).double().mean())
    assert opened[0.2] > opened[0.0]


def sites_of(layer):
    return {FRONT: AffineSite(FRONT, layer.net[0].proj), BEHIND: Site(BEHIND, layer.net[2])}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate"])
@torch.no_grad()
def test_two_units_compute_a_gate_beside_what_the_layer_did(activation, count):
    layer = FeedForward(6, mult=4, activation_fn=activation).double()
    gates = [gate_of(6, 6, seed) for seed in range(1, 1 + 2 * count, 2)]
    x, ordinary = normal(50, 6), normal(500, 6, seed=9)
    energy = layer.net[0](ordinary).square().mean(0)
    sites = sites_of(layer)
    before = {name: site.read().clone() for name, site in sites.items()}
    rewrites = dict(zip(sites, written(gates, *before.values(), energy), strict=True))
    for name, site in sites.items():
        site.write(rewrites[name].merged(before[name]))
    # 1. The units that went are those that write least, and nothing else changed.
    least = (before[BEHIND].norm(dim=0).square() * energy).argsort()[: 2 * count]
    kept = torch.ones(24, dtype=torch.bool)
    kept[least] = False
    assert torch.equal(sites[BEHIND].read()[:, kept], before[BEHIND][:, kept])
    halves = 2 if activation == "geglu" else 1
    assert torch.equal(sites[FRONT].read()[kept.repeat(halves)], before[FRONT][kept.repeat(halves)])
    assert [rewrites[name].rank for name in sites] == [2 * count * halves, 2 * count]
    # 2. What they write is the gates' steps.
    found = layer(x)
    layer.net[2].weight[:, ~kept] = 0
    steps = sum(gate(x)[:, None] * gate.step for gate in gates)
    largest = max(float(gate.step.norm()) for gate in gates)
    rounding = 2e-3 if activation == "gelu-approximate" else 1e-12
    assert (found - layer(x) - steps).norm(dim=1).max() < rounding * largest
    # 3. The gates are clamp((d·x − θ) / σ, 0, 1), but for their corners.
    for gate in gates:
        clamped = ((x @ gate.reader - gate.threshold) / gate.scale).clamp(0, 1)
        assert (gate(x) - clamped).abs().max() < 0.2 / SHARPNESS
        assert (clamped.min(), clamped.max()) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("left_out", [None, "weight", "bias"])
@torch.no_grad()
def test_the_proof_asks_for_weight_and_bias(left_out, dtype):
    layer = FeedForward(32, mult=4).to(dtype)
    site = AffineSite(FRONT, layer.net[0].proj)
    before = site.read().clone()
    gate = gate_of(32, 32, 1)
    front, _ = written([gate], before, layer.net[2].weight, torch.ones(128))
    edited, measured = front.merged(before), Measurements()
    site.write(edited)
    assert torch.equal(site.read(), edited)
    assert not torch.equal(layer.net[0].proj.bias, before[:, -1])
    if left_out == "bias":
        layer.net[0].proj.bias.copy_(before[:, -1])
    if left_out == "weight":
        layer.net[0].proj.weight.copy_(before[:, :-1])
    measured.ask_layer(site, front.asked, edited, before, edited)
    if left_out is None:
        assert measured.require_edited({FRONT: site})["layer_changed"] > 100
    else:
        with pytest.raises(SiteNotFoundError, match="proof by run failed"):
            measured.require_edited({FRONT: site})


def test_an_offloaded_bias_is_written_where_it_lives():
    model = nn.Sequential(nn.Linear(3, 2))
    value = torch.arange(8.0).reshape(2, 4)
    cpu_offload(model, torch.device("cpu"))
    site = AffineSite("0", model[0])
    site.write(value)
    assert model[0].bias.is_meta
    assert torch.equal(site.read(), value)
    z = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(model(z), value[:, 0] + value[None, :, 3])


def test_what_has_no_bias_or_shares_its_weight_is_refused():
    with pytest.raises(SiteNotFoundError, match="no bias"):
        AffineSite("layer", nn.Linear(3, 2, bias=False))
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    check_unshared({"a": AffineSite("a", model["a"])}, model)
    model["b"].weight = model["a"].weight
    with pytest.raises(SiteNotFoundError, match="is shared by"):
        check_unshared({"a": AffineSite("a", model["a"])}, model)
