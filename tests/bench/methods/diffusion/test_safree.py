"""SAFREE: its parts by hand, and its projection in numpy."""

import math

import diffusers
import numpy as np
import pytest
import torch
from support.methods import CONCEPT, NAMED, OTHER, draw, run
from support.texts import encode

from more_hf_bench.methods.diffusion import safree as safree_module
from more_hf_bench.methods.diffusion.safree import attenuate, filter_steps, projector, triggers


def test_safree_projector_triggers_and_filter_by_hand():
    X = torch.tensor([[1.0, 2], [1, 2], [0, 0]]).double()  # rank one
    assert torch.allclose(projector(X), torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]]).double())
    away = torch.diag(torch.tensor([0.0, 1]).double())
    masked = torch.tensor([[9.0, 1.0], [9, 1.02], [9, 1.0]]).double()  # distances 1, 1.02, 1
    assert triggers(masked, away, 0.01).tolist() == [False, True, False]
    assert triggers(masked, away, 0.05).tolist() == [False, False, False]
    assert triggers(masked[:1], away, 0.01).tolist() == [False]
    z, moved = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]])  # cosines 1 and 0, β = ½
    assert filter_steps(z, moved, 5.5, 3.5) == round(10 / (1 + math.exp(3.5)))
    assert filter_steps(z, -z, 5.5, 3.5) == 10


def test_safree_attenuates_low_frequencies_where_the_projected_prompt_has_more():
    skip = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = attenuate(skip, torch.tensor([False]), 0.5)
    assert torch.equal(found[0], skip[0])
    assert torch.equal(found[2], skip[2])
    spectra = [np.fft.fft2(row.numpy()) for row in skip]  # unshifted: the centre is frequencies 0 and −1
    changed = 0
    for c in range(2):
        for i in (0, -1):
            for j in (0, -1):
                if (spectra[2][c, i, j] - spectra[1][c, i, j]).real <= 0:
                    spectra[1][c, i, j] *= 0.5
                    changed += 1
    assert 0 < changed < 8
    means = attenuate(skip, torch.tensor([True]), 0.0)[1].mean(dim=(-2, -1))
    assert torch.allclose(means, torch.zeros(2), atol=1e-6)
    assert np.allclose(found[1].numpy(), np.fft.ifft2(spectra[1]).real, atol=1e-5)


@pytest.mark.parametrize("version", ["1", "2"])
def test_safree_projects_its_triggers(tiny_sd, version):
    pipe = tiny_sd(version)
    guarded = run("safree", pipe)
    found, negative = guarded.encode_prompt([OTHER, NAMED], "cpu", 1, True)
    assert torch.equal(negative[0], encode(pipe, CONCEPT)[0][0])
    c = encode(pipe, CONCEPT).pooler_output[0].double().numpy()
    away = np.eye(len(c)) - np.outer(c, c) / (c @ c)
    padded = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length}
    ids = pipe.tokenizer(NAMED, **padded, return_tensors="pt").input_ids
    n = len(pipe.tokenizer(NAMED).input_ids) - 2
    rows = []
    for i in range(n):
        masked = ids.clone()
        masked[0, 1 + i] = 0
        with torch.no_grad():
            rows.append(pipe.text_encoder(masked).pooler_output[0].double().numpy())
    U, values, _ = np.linalg.svd(np.array(rows).T, full_matrices=False)
    U = U[:, values**2 > n * np.finfo(np.float32).eps * values[0] ** 2]
    move = away @ U @ U.T
    far = np.array([np.linalg.norm(away @ row) for row in rows])
    expected = encode(pipe, NAMED)[0][0].double().numpy()
    hit = [i for i in range(n) if far[i] >= 1.01 * np.delete(far, i).mean()]
    cosines = [z @ move @ z / np.linalg.norm(z) / np.linalg.norm(move @ z) for z in expected[: n + 2]]
    for i in hit:
        expected[1 + i] = move @ expected[1 + i]
    assert 0 < len(hit) < n
    assert np.allclose(found[1].numpy(), expected, atol=1e-4)
    beta = 1 - np.mean(cosines)
    assert guarded.projected_steps[1] == round(10 / (1 + math.exp(-7 * (10 * beta - 5.5))))


def test_safree_uses_the_projected_prompt_for_the_first_steps(tiny_sd):
    pipe = tiny_sd("1")
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    reads, layer = [], pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = layer.register_forward_pre_hook(lambda _, args: reads.append(args[0].clone()))
    plain = encode(pipe, NAMED)[0][0]
    # The filter says 10 and 0 of 50 steps; the steps of this run are 0, 10, 20, 30, 40.
    for midpoint, expected in ((-100.0, [True, True, False, False, False]), (100.0, [True] + 4 * [False])):
        guarded = run("safree", pipe, midpoint=midpoint)
        reads.clear()
        draw(guarded, [NAMED], steps=5)
        assert [not torch.allclose(read[-1], plain, atol=1e-5) for read in reads] == expected
        assert all(len(read) == 2 for read in reads)
    handle.remove()


def test_safree_without_triggers_is_the_pipeline(tiny_sd, monkeypatch):
    pipe = tiny_sd("2")
    plain = draw(pipe, [NAMED])
    assert torch.allclose(draw(run("safree", pipe, alpha=1e3, negative=False), [NAMED]), plain, atol=1e-5)
    once = run("safree", pipe, negative=False)
    again = run("safree", pipe, negative=False, re_attention=True)
    projected = draw(once, [NAMED])
    assert not torch.allclose(projected, plain, atol=1e-3)
    assert not torch.allclose(draw(again, [NAMED]), projected, atol=1e-3)
    assert torch.allclose(draw(again, [OTHER, NAMED])[1], draw(again, [NAMED])[0], atol=1e-4)
    assert not any(block._forward_pre_hooks for block in pipe.unet.up_blocks)
    monkeypatch.setattr(safree_module, "SKIP_SCALES", (1.0, 1.0))
    assert torch.allclose(draw(again, [NAMED]), projected, atol=1e-4)
