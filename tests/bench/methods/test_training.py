"""ESD and CA: their targets and losses by hand, a few steps that reduce them, stopping and going on."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from more_hf.bench.methods.diffusion import esd as esd_module
from more_hf.bench.methods.diffusion import training
from more_hf.bench.methods.diffusion.ca import ablation_loss, anchor_texts, ca, detach_begin_token
from more_hf.bench.methods.diffusion.esd import esd, sample_until, target
from more_hf.core.errors import IncompatibleBaseError, MoreError


CONCEPT = "van gogh"
NAMES = {"remap_to": ["claude monet"], "retain": ["pablo picasso"]}
ESD = {**NAMES, "sampling_steps": 4, "iterations": 2, "learning_rate": 1e-3}
CA = {**NAMES, "images": 4, "prompts": ["a cat", "a tree", "a car"], "sampling_steps": 2, "iterations": 2, "learning_rate": 1e-3}
METHODS = {"esd": (esd, ESD), "ca": (ca, CA)}


def encode(pipe, text):
    ids = pipe.tokenizer(text, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def changed(pipe, before):
    return {name for name, value in pipe.unet.state_dict().items() if not torch.equal(value, before[name])}


def state_of(pipe):
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_the_layers_that_read_text_and_nothing_else(tiny_sd, name, version):
    method, settings = METHODS[name]
    pipe = tiny_sd(version)
    before, random = state_of(pipe), torch.get_rng_state()
    others = {key: value.clone() for part in (pipe.vae, pipe.text_encoder) for key, value in part.state_dict().items()}
    grads = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    scheduler = pipe.scheduler
    with torch.no_grad():  # a caller's own
        assert method(pipe, CONCEPT, **settings) is pipe
    ends = ("to_k.weight", "to_v.weight")
    if name == "esd":
        ends = (*ends, "to_q.weight", "to_out.0.weight", "to_out.0.bias")
    assert changed(pipe, before) == {key for key in before if ".attn2." in key and key.endswith(ends)}
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, others[k]) for part in (pipe.vae, pipe.text_encoder) for k, v in part.state_dict().items())
    assert grads == {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    assert pipe.scheduler is scheduler
    assert not any(m._forward_hooks for m in pipe.unet.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_to_the_same_weights(tiny_sd, name, tmp_path, monkeypatch):
    method, settings = METHODS[name]
    whole, stopped = tiny_sd("1"), tiny_sd("1")
    method(whole, CONCEPT, **{**settings, "iterations": 3})
    before, folder = state_of(stopped), tmp_path / "runs"
    ask = {**settings, "iterations": 3, "checkpoint": str(folder), "save_every": 1}

    step, steps = torch.optim.Optimizer.zero_grad, []
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **kw: (step(self, **kw), steps.append(1), stop_at(steps, 2))[0])
    with pytest.raises(KeyboardInterrupt):
        method(stopped, CONCEPT, **ask)
    monkeypatch.undo()
    assert not changed(stopped, before)  # whole or not at all
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **kw: (step(self, **kw), steps.append(1))[0])
    method(stopped, CONCEPT, **ask)
    assert len(steps) == 2 + 2  # one step was saved
    assert all(torch.equal(a, b) for a, b in zip(whole.unet.state_dict().values(), stopped.unet.state_dict().values(), strict=True))
    assert not list(tmp_path.rglob("*.part"))
    files = set(folder.iterdir())
    for other, concept in ((tiny_sd("1"), "andy warhol"), (tiny_sd("1", seed=1), CONCEPT)):  # other runs do not go on from this one
        steps.clear()
        method(other, concept, **ask)
        assert len(steps) == 3
        assert set(folder.iterdir()) > files
        files = set(folder.iterdir())


def stop_at(steps, count):
    if len(steps) == count:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_several_concepts_with_aliases(tiny_sd, name):
    method, settings = METHODS[name]
    pipe = tiny_sd("1")
    before = state_of(pipe)
    method(pipe, {CONCEPT: ["vincent"], "andy warhol": []}, **{**settings, "remap_to": None})
    assert changed(pipe, before)


@pytest.mark.slow
def test_seed_decides(tiny_sd):
    first, second, third = tiny_sd("1"), tiny_sd("1"), tiny_sd("1")
    for pipe, seed in ((first, 0), (second, 0), (third, 1)):
        esd(pipe, CONCEPT, **ESD, seed=seed)
    assert not changed(first, state_of(second))
    assert changed(first, state_of(third))


def test_divergence_leaves_the_pipeline_alone(tiny_sd):
    pipe = tiny_sd("1")
    before = state_of(pipe)
    with pytest.raises(IncompatibleBaseError, match="not finite"):
        esd(pipe, CONCEPT, **{**ESD, "learning_rate": float("inf")})
    assert not changed(pipe, before)


def test_esd_targets_by_hand():
    unguided, guided = torch.tensor([1.0, 0.0]), torch.tensor([3.0, -1.0])
    assert target(unguided, guided, 1.0, "paper").tolist() == [-1.0, 1.0]
    assert target(unguided, guided, 2.0, "repo").tolist() == [-1.0, 1.0]
    assert target(unguided, guided, 1.0, "repo").tolist() == [1.0, 0.0]


def test_esd_target_in_v_is_the_target_in_noise():
    x, v0, vc = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    a, s = 0.6, 0.8
    for variant in ("paper", "repo"):
        in_noise = target(a * v0 + s * x, a * vc + s * x, 1.7, variant)
        assert torch.allclose(a * target(v0, vc, 1.7, variant) + s * x, in_noise, atol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "repo"])
@pytest.mark.parametrize("version", ["1", "2"])
def test_esd_loss_is_the_formula_on_its_own_draws(tiny_sd, monkeypatch, variant, version):
    """Catch what the loss was computed from in the first iteration, and compute it again from the original."""
    pipe = tiny_sd(version)
    original, seen, copies = copy.deepcopy(pipe.unet), {}, []
    mse, float_copy = torch.nn.functional.mse_loss, esd_module.float_copy

    def copied(pipe):
        copies.append(float_copy(pipe))
        copies[-1].register_forward_pre_hook(lambda _, args: seen.update(t=int(args[1])))  # of the last call, the student's
        return copies[-1]

    def start(denoiser, sampler, x, empty, text, guidance, level):
        seen.update(denoiser=denoiser, level=level, x=sample_until(denoiser, sampler, x, empty, text, guidance, level))
        return seen["x"]

    def compared(predicted, wanted):
        seen.update(predicted=predicted.detach(), wanted=wanted)
        return mse(predicted, wanted)

    monkeypatch.setattr(esd_module, "float_copy", copied)
    monkeypatch.setattr(esd_module, "sample_until", start)
    monkeypatch.setattr(torch.nn.functional, "mse_loss", compared)
    esd(pipe, CONCEPT, **{**ESD, "iterations": 1}, variant=variant)

    x, t = seen["x"], seen["t"]
    assert seen["denoiser"] is copies[0 if variant == "paper" else 1]
    if variant == "paper":
        assert seen["level"] * 250 <= t < (seen["level"] + 1) * 250
    empty, concept = encode(pipe, ""), encode(pipe, CONCEPT)
    with torch.no_grad():
        e0, ec = original(x, t, empty).sample, original(x, t, concept).sample
    assert torch.allclose(seen["predicted"], ec, atol=1e-5)
    expected = e0 - 1.0 * (ec - e0) if variant == "paper" else ec - 2.0 * (ec - e0)
    assert torch.allclose(seen["wanted"], expected, atol=1e-5)
    assert not torch.allclose(seen["wanted"], ec, atol=1e-3)


def test_esd_start_points_are_guided_ddim(tiny_sd):
    pipe = tiny_sd("2")
    sampler = DDIMScheduler.from_config(pipe.scheduler.config)
    sampler.set_timesteps(4)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    empty, concept = encode(pipe, "")[0], encode(pipe, CONCEPT)[0]
    assert torch.equal(sample_until(pipe.unet, sampler, x, empty, concept, 3.0, 3), x)
    found = sample_until(pipe.unet, sampler, x, empty, concept, 3.0, 1)
    ask = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": x, "output_type": "latent"}
    expected = pipe(CONCEPT, **ask, callback_on_step_end=stop_after(2)).images
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, x, atol=1e-2)


def stop_after(count):
    def callback(pipe, i, t, values):
        pipe._interrupt = i + 1 >= count
        return values

    return callback


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["paper", "repo"])
def test_esd_reduces_its_loss(tiny_sd, variant):
    pipe = tiny_sd("2")
    original = copy.deepcopy(pipe.unet)
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    empty, concept = (encode(pipe, text).expand(8, -1, -1) for text in ("", CONCEPT))
    t = torch.arange(50, 1000, 120)[:8]
    with torch.no_grad():
        e0, ec = original(x, t, empty).sample, original(x, t, concept).sample
        wanted = 2 * e0 - ec
        before = (ec - wanted).square().mean()
        esd(pipe, CONCEPT, **{**ESD, "iterations": 12, "learning_rate": 6e-3}, variant=variant)
        after = (pipe.unet(x, t, concept).sample - wanted).square().mean()
    assert after < 0.7 * before


def test_esd_layers_and_words(tiny_sd):
    pipe = tiny_sd("1")
    counts = {layers: set(training.trainable_names(pipe, layers)) for layers in training.LAYERS}
    assert counts["x-strict"] == {n for n in counts["all"] if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert counts["x"] == {n for n in counts["all"] if ".attn2." in n}
    assert counts["u"] == counts["all"] - counts["x"]
    assert counts["all"] == {n for n, _ in pipe.unet.named_parameters()}
    for wrong in ({"layers": "noxattn"}, {"variant": "2025"}):
        with pytest.raises(MoreError, match="Unknown"):
            esd(pipe, CONCEPT, **ESD, **wrong)
    with pytest.raises(MoreError, match="at least one image"):
        ca(pipe, CONCEPT, **{**CA, "images": 0})
    with pytest.raises(MoreError, match="no room"):
        ca(pipe, CONCEPT, **{**CA, "prompts": ["a cat", "a " * 40]})


def test_ca_anchor_texts():
    assert anchor_texts(["a", "b"], [], 3) == [("a", "a"), ("b", "b"), ("a", "a")]
    assert anchor_texts(["a", "b"], ["X", "Y"], 4) == [
        ("a", "a, in the style of X"),
        ("b", "b, in the style of Y"),
        ("a", "a, in the style of Y"),
        ("b", "b, in the style of X"),
    ]


def test_ca_loss_and_its_gradient(tiny_sd):
    """The anchor's side gets no gradient: the gradient is that of a regression on a constant."""
    unet = tiny_sd("1").unet
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700])
    concept, anchor = torch.randn(2, 2, 48, 32, generator=torch.Generator().manual_seed(1))
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight
    wanted = unet(x, t, anchor).sample.detach().clone()
    expected = (unet(x, t, concept).sample - wanted).square().mean()
    found = ablation_loss(unet, x, t, concept, anchor)
    assert torch.allclose(found, expected)
    assert found > 1e-5
    assert torch.allclose(*(torch.autograd.grad(value, weight)[0] for value in (found, expected)))


@pytest.mark.slow
def test_ca_reduces_its_loss(tiny_sd):
    pipe = tiny_sd("2")
    x = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    t = torch.arange(50, 1000, 120)[:8]
    concept, anchor = (encode(pipe, f"a tree, in the style of {name}").expand(8, -1, -1) for name in (CONCEPT, "claude monet"))

    def loss():
        with torch.no_grad():
            return (pipe.unet(x, t, concept).sample - pipe.unet(x, t, anchor).sample).square().mean()

    before = loss()
    ca(pipe, CONCEPT, **{**CA, "iterations": 15, "learning_rate": 5e-3})
    assert loss() < 0.5 * before


def test_ca_draws_anchors_once_by_its_recipe(tiny_sd, tmp_path, monkeypatch):
    pipe = tiny_sd("1")
    ca(pipe, CONCEPT, **{**CA, "iterations": 0, "checkpoint": str(tmp_path)})
    held = torch.load(next(tmp_path.glob("ca-anchors-*.pt")), weights_only=True)["latents"]
    assert held.shape == (4, 2, 4, 16, 16)
    drawing = copy.copy(pipe)
    drawing.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    ask = {"num_inference_steps": 2, "guidance_scale": 6.0, "output_type": "pt", "generator": torch.Generator().manual_seed(1)}
    pixels = 2 * drawing("a tree, in the style of claude monet", **ask).images - 1
    with torch.no_grad():
        for flip, picture in enumerate((pixels, pixels.flip(-1))):
            expected = pipe.vae.encode(picture).latent_dist.mean[0] * pipe.vae.config.scaling_factor
            assert torch.allclose(held[1, flip], expected, atol=1e-4)
    assert not torch.allclose(held[1, 0], held[1, 1], atol=1e-3)
    assert not torch.allclose(held[0], held[1], atol=1e-3)

    def refuse(*args, **kwargs):
        raise AssertionError("drew again")

    monkeypatch.setattr(type(pipe), "__call__", refuse)
    ca(pipe, CONCEPT, **{**CA, "learning_rate": 1e-4, "checkpoint": str(tmp_path)})


def test_ca_gives_the_begin_token_no_gradient():
    layer = torch.nn.Linear(3, 2, bias=False)
    layer.register_forward_hook(detach_begin_token)
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(z), z @ layer.weight.T)
    layer(z).sum().backward()
    assert torch.allclose(layer.weight.grad, z[:, 1:].sum((0, 1)).expand(2, -1))
