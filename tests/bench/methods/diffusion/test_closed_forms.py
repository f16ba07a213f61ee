"""What holds for every closed form: UCE, RECE, CURE, SPEED, OCE and ours without PO."""

import numpy as np
import pytest
import torch
from support.closed_forms import CONCEPT, MANY, RETAIN, TARGET, run
from support.compare import changed, same, state
from support.texts import text_layers

from more_hf.core.errors import PrototypeError
from more_hf_bench.methods.registry import DIFFUSION


CLOSED = ["uce", "rece", "cure", "speed", "oce", "more-without-po"]
VALUES_ONLY = {"speed", "oce"}


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize("name", CLOSED)
def test_moves_the_picture_and_only_layers_that_read_text(tiny_sd, name, version):
    pipe = tiny_sd(version)
    ask = {"num_inference_steps": 2, "output_type": "latent", "prompt": [f"a cat by {CONCEPT}"]}
    picture = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    before, torch_state, numpy_state = state(pipe), torch.get_rng_state(), np.random.get_state()[1].copy()
    assert run(name, pipe) is pipe
    ends = ("to_v",) if name in VALUES_ONLY else ("to_k", "to_v")
    assert changed(pipe, before) == {f"unet.{key}" for key in text_layers(pipe, ends)}
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    after = pipe(**ask, generator=torch.Generator().manual_seed(0)).images
    assert torch.isfinite(after).all()
    assert (after - picture).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", CLOSED)
def test_works_in_half_precision_and_without_targets_or_retained_names(tiny_sd, name):
    pipe = tiny_sd("1")
    pipe.unet.to(torch.bfloat16)
    before = state(pipe)
    run(name, pipe, remap_to=None, retain=None)  # "art" stands in where a method needs a guide
    assert not same(pipe, before)
    assert {w.dtype for name, w in pipe.unet.named_parameters() if "attn2" in name} == {torch.bfloat16}


@pytest.mark.parametrize("name", CLOSED)
def test_names_are_checked_and_nothing_is_changed_then(tiny_sd, name):
    pipe = tiny_sd("1")
    before = state(pipe)
    with pytest.raises(PrototypeError, match="both erased"):
        run(name, pipe, retain=["Van Gogh"])
    assert same(pipe, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLOSED if name != "uce"])
def test_several_concepts_with_aliases(tiny_sd, name):
    pipe = tiny_sd("1", block_out_channels=(16, 32))
    before = text_layers(pipe, ("to_v",))
    DIFFUSION[name].load()(pipe, MANY, remap_to=[TARGET, "johannes vermeer"], retain=RETAIN)
    assert all((W - before[key]).norm() > 1e-4 for key, W in text_layers(pipe, ("to_v",)).items())
