"""Gates in the feed-forward layers: what is fitted, what is written, and what plain diffusers loads."""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import FeedForward
from torch.nn.functional import gelu

from more_hf.core.errors import MoreError
from more_hf_bench.methods.diffusion import gates
from more_hf_bench.methods.diffusion.gates import (
    SHARPNESS,
    Gate,
    Reading,
    Shown,
    gates_within,
    more_gates,
    moved,
    put_into,
    without_least_units,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_units_that_go_are_those_that_least_squares_misses_least():
    features = normal(200, 6) @ normal(6, 6, seed=1)
    weight = normal(3, 6, seed=2)
    truth = features @ weight.T

    def error_without(units):
        kept = [unit for unit in range(6) if unit not in units]
        fitted = torch.linalg.lstsq(features[:, kept], truth).solution
        return float((features[:, kept] @ fitted - truth).square().sum())

    edited, units = without_least_units(weight, features.T @ features, 2)
    assert not edited[:, units].any()
    first, second = units
    assert error_without([first]) == pytest.approx(min(error_without([unit]) for unit in range(6)), rel=1e-3)
    left = float((features @ edited.T - truth).square().sum())
    assert left == pytest.approx(error_without([first, second]), rel=1e-3)
    assert left < float((features[:, units] @ weight[:, units].T).square().sum())  # without a refit


def test_a_gate_is_shut_on_others_and_reads_along_the_discriminant():
    mixing, apart = normal(5, 5, seed=1), normal(5, seed=3)
    others, own = normal(3000, 4, 5) @ mixing, normal(300, 4, 5, seed=2) @ mixing + 4 * apart
    reading = Reading.fit(own, others[::2], others[1::2], apart, shrinkage=0)
    expected = torch.linalg.solve(mixing.T @ mixing, apart)
    assert torch.cosine_similarity(reading.reader, expected, dim=0) > 0.99
    gate = reading.gate(30, 0.99)
    assert torch.equal(gate.step, 30 * apart)
    assert float((gate(others[1::2]) > 0).double().mean()) == pytest.approx(0.01, abs=1e-3)
    assert float((gate(own) > 0).double().mean()) > 0.5


def test_a_reader_of_few_pictures_reads_new_ones_better_with_shrinkage():
    width = 60
    apart = 0.5 * torch.eye(width, dtype=torch.float64)[0]
    others, own = normal(60, 1, width), normal(40, 1, width, seed=1) + apart
    new_others, new = normal(4000, 1, width, seed=2), normal(4000, 1, width, seed=3) + apart
    fires = {}
    for shrinkage in (0.0, 0.2):
        gate = Reading.fit(own, others, new_others, apart, shrinkage).gate(1, 0.99)
        fires[shrinkage] = float((gate(new) > 0).double().mean())
    assert fires[0.2] > fires[0.0]


def test_two_units_compute_the_gate_beside_what_the_layer_did():
    layer = FeedForward(6, mult=2).double()
    x, gate = normal(50, 6), Gate(normal(6, seed=1), 0.3, 0.7, normal(6, seed=2))
    hidden = layer.net[0](x)
    moment = (hidden.T @ hidden).detach()
    weight, _ = without_least_units(layer.net[2].weight.double(), moment, 2)
    rest = (hidden @ weight.T + layer.net[2].bias).detach()
    put_into(layer, [gate], moment)
    written = layer(x).detach() - rest
    z = SHARPNESS * (x @ gate.reader - gate.threshold) / gate.scale
    opened = (gelu(z) - gelu(z - SHARPNESS)) / SHARPNESS
    assert torch.allclose(written, opened[:, None] * gate.step, atol=1e-9)
    assert (opened - gate(x)).abs().max() < 0.2 / SHARPNESS
    assert gate(x).max() == 1


@pytest.mark.parametrize("concepts", [1, 2])
def test_the_weights_change_by_a_lora_and_the_biases_do_too(concepts):
    layer = FeedForward(12, mult=4).double()
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    hidden = layer.net[0](normal(200, 12)).detach()
    both = [Gate(normal(12, seed=1 + i), 0.3, 0.7, normal(12, seed=3 + i)) for i in range(2)]
    put_into(layer, both[:concepts], hidden.T @ hidden)
    changes = {name: weight - before[name] for name, weight in layer.state_dict().items()}
    assert torch.linalg.matrix_rank(changes["net.0.proj.weight"]) == 4 * concepts
    assert torch.linalg.matrix_rank(changes["net.2.weight"]) == 3 * concepts
    assert changes["net.0.proj.bias"].count_nonzero() == 4 * concepts
    assert not changes["net.2.bias"].any()


def test_the_widest_gates_within_the_price_that_move_the_concept_enough(tiny_sd, monkeypatch):
    monkeypatch.setattr(gates, "QUANTILES", (0.9,))
    monkeypatch.setattr(gates, "STRENGTHS", (0, 10, 100))
    pipe = tiny_sd("1")
    blocks = {name: block for name, block in pipe.unet.named_modules() if gates.is_gated(block)}
    size, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
    text = pipe.encode_prompt(["van gogh", "a house"], "cpu", 1, False)[0]

    def pictures(seed):
        latents, noise = normal(2, 2, channels, size, size, seed=seed).float()
        return Shown(latents, noise, text, text[[1, 1]])

    readings, hidden = {}, {}
    for name, block in blocks.items():
        width, units = block.ff.net[0].proj.in_features, block.ff.net[2].in_features
        reads = normal(100).sort().values
        readings[name] = Reading(normal(width, seed=1), 1.0, reads, normal(width, seed=2))
        hidden[name] = torch.eye(units, dtype=torch.float64)
    own, others = pictures(0), [pictures(1), pictures(2)]
    before = [shown.predictions(pipe) for shown in others]

    def chosen(price):
        """The strength that is chosen, and how far others' predictions move with it."""
        found = gates_within(price, pipe, own, others, readings, hidden)
        edited = copy.copy(pipe)
        edited.register_modules(unet=copy.deepcopy(pipe.unet))
        for name, gate in found.items():
            put_into(edited.unet.get_submodule(name).ff, [gate], hidden[name])
        after = [shown.predictions(edited) for shown in others]
        name = next(iter(found))
        strength = float(found[name].step.norm() / readings[name].step.norm())
        return strength, sum(map(moved, before, after)) / len(others)

    weakest, cost_of_weakest = chosen(0)
    strongest, cost_of_strongest = chosen(1e9)
    assert (weakest, strongest) == (0, pytest.approx(100))
    middle, cost = chosen(0.99 * cost_of_strongest)
    assert middle == pytest.approx(10)
    assert cost_of_weakest < cost < cost_of_strongest

    # the first quantile that moves the concept enough, or the one that moves it most: the wider one
    monkeypatch.setattr(gates, "QUANTILES", (0.9, 0.5))
    for enough, quantile in ((0, 0.9), (1e9, 0.5)):
        monkeypatch.setattr(gates, "ENOUGH", enough)
        found = gates_within(1e9, pipe, own, others, readings, hidden)
        name = next(iter(found))
        assert found[name].threshold == float(readings[name].others[int(quantile * 99)])


def test_plain_diffusers_loads_an_erased_pipeline_of_the_same_shapes(tiny_sd, tmp_path):
    pipe = tiny_sd("1")
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    options = {"remap_to": ["claude monet"], "retain": None, "pictures": 4, "sampling_steps": 2}
    pipe = more_gates(pipe, "van gogh", **options)
    after = pipe.unet.state_dict()
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in before.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("ff.net.0.proj" in name for name in moved)
    assert all(".ff.net." in name or ".attn2.to_" in name for name in moved)
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path).unet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in after.items())


def test_a_denoiser_without_gates_is_refused_unchanged(tiny_sd, monkeypatch):
    pipe = tiny_sd("1")
    monkeypatch.setattr("more_hf_bench.methods.diffusion.gates.is_gated", lambda module: False)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    with pytest.raises(MoreError, match="no feed-forward layers with GEGLU"):
        more_gates(pipe, "van gogh", remap_to=["claude monet"], retain=None)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())


def test_what_moved_is_a_mean_over_pictures_of_relative_lengths():
    before = normal(4, 3, 2)
    one, all_of_them = before.clone(), 1.25 * before
    one[0] *= 2
    assert moved(before, one) == pytest.approx(0.25)
    assert moved(before, all_of_them) == pytest.approx(0.25)
    assert moved(before, before) == 0
