"""ESD and CA: what both do, and how a run that was stopped goes on."""

import pytest
import torch
from support.compare import changed, same, state
from support.methods import CA, CONCEPT, ESD, MANY

from more_hf.core.errors import IncompatibleBaseError
from more_hf_bench.methods.diffusion.ca import ca
from more_hf_bench.methods.diffusion.esd import esd
from more_hf_bench.methods.diffusion.training import Checkpoint


METHODS = {"esd": (esd, ESD), "ca": (ca, CA)}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", METHODS)
def test_trains_the_layers_that_read_text_and_nothing_else(tiny_sd, name, version):
    method, settings = METHODS[name]
    pipe = tiny_sd(version)
    before, random = state(pipe.unet), torch.get_rng_state()
    vae, text_encoder = state(pipe.vae), state(pipe.text_encoder)
    grads = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    scheduler = pipe.scheduler
    with torch.no_grad():  # a caller's own
        assert method(pipe, CONCEPT, **settings) is pipe
    ends = ("to_k.weight", "to_v.weight")
    if name == "esd":
        ends = (*ends, "to_q.weight", "to_out.0.weight", "to_out.0.bias")
    assert changed(pipe.unet, before) == {key for key in before if ".attn2." in key and key.endswith(ends)}
    assert torch.equal(torch.get_rng_state(), random)
    assert same(pipe.vae, vae)
    assert same(pipe.text_encoder, text_encoder)
    assert grads == {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    assert pipe.scheduler is scheduler
    assert not any(m._forward_hooks for m in pipe.unet.modules())


class Saves:
    """Counts the steps that are saved, and stops the run in place of one of them."""

    def __init__(self, monkeypatch):
        self.count, self.stop_at, save = 0, None, Checkpoint.save

        def counting_save(checkpoint, contents):
            if "optimizer" in contents:  # a step of the training, not a batch of anchors
                self.count += 1
                if self.count == self.stop_at:
                    raise KeyboardInterrupt
            save(checkpoint, contents)

        monkeypatch.setattr(Checkpoint, "save", counting_save)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_to_the_same_weights(tiny_sd, name, tmp_path, monkeypatch):
    method, settings = METHODS[name]
    whole, stopped = tiny_sd("1"), tiny_sd("1")
    method(whole, CONCEPT, **{**settings, "iterations": 3})
    before, folder = state(stopped.unet), tmp_path / "runs"
    settings = {**settings, "iterations": 3, "checkpoint": str(folder), "save_every": 1}

    saves = Saves(monkeypatch)
    saves.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        method(stopped, CONCEPT, **settings)
    assert not changed(stopped.unet, before)  # whole or not at all
    saves.count, saves.stop_at = 0, None
    method(stopped, CONCEPT, **settings)
    assert saves.count == 2  # one step was saved before
    assert same(stopped.unet, state(whole.unet))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_does_not_go_on_from_another_one(tiny_sd, name, tmp_path, monkeypatch):
    method, settings = METHODS[name]
    settings = {**settings, "checkpoint": str(tmp_path), "save_every": 1}
    method(tiny_sd("1"), CONCEPT, **settings)
    saves, files = Saves(monkeypatch), set(tmp_path.iterdir())
    for pipe, concept in ((tiny_sd("1"), "kelly mckernan"), (tiny_sd("1", seed=1), CONCEPT)):
        saves.count = 0
        method(pipe, concept, **settings)
        assert saves.count == settings["iterations"]
        assert set(tmp_path.iterdir()) > files
        files = set(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_several_concepts_with_aliases(tiny_sd, name):
    method, settings = METHODS[name]
    pipe = tiny_sd("1")
    before = state(pipe.unet)
    method(pipe, MANY, **{**settings, "remap_to": None})
    assert changed(pipe.unet, before)


@pytest.mark.slow
def test_seed_decides(tiny_sd):
    first, second, third = tiny_sd("1"), tiny_sd("1"), tiny_sd("1")
    for pipe, seed in ((first, 0), (second, 0), (third, 1)):
        esd(pipe, CONCEPT, **ESD, seed=seed)
    assert not changed(first.unet, state(second.unet))
    assert changed(first.unet, state(third.unet))


def test_divergence_leaves_the_pipeline_alone(tiny_sd):
    pipe = tiny_sd("1")
    before = state(pipe.unet)
    with pytest.raises(IncompatibleBaseError, match="not finite"):
        esd(pipe, CONCEPT, **{**ESD, "learning_rate": float("inf")})
    assert not changed(pipe.unet, before)
