"""Pictures from prompts: each from its own seed, by the pipeline as it is, without its bar and checker."""

import torch
from torch import nn

from more_hf.diffusion.draw import draw


SAMPLING = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}


class Checker(nn.Module):
    def forward(self, *args, **kwargs):
        raise AssertionError("asked")


def test_a_picture_depends_on_its_own_seed(tiny_sd, capfd):
    pipe = tiny_sd()
    both = draw(pipe, ["a dog", "a cat"], [3, 4], SAMPLING)
    assert (both.dtype, both.shape[:2]) == (torch.uint8, (2, 3))
    assert capfd.readouterr().err == ""
    alone = draw(pipe, ["a cat"], [4], SAMPLING)[0]
    assert (alone.int() - both[1].int()).abs().max() <= 1
    assert not torch.equal(draw(pipe, ["a cat"], [5], SAMPLING)[0], alone)
    expected = pipe("a cat", generator=torch.Generator().manual_seed(4), output_type="pt", **SAMPLING).images
    assert (255 * expected[0] - alone).abs().max() <= 1


def test_the_safety_checker_is_not_asked_and_stays(tiny_sd):
    pipe, checker = tiny_sd(), Checker()
    pipe.register_modules(safety_checker=checker)
    draw(pipe, ["a dog"], [0], SAMPLING)
    assert pipe.safety_checker is checker
