"""CURE."""

import numpy as np
import torch
from support.closed_forms import CONCEPT, RETAIN, TARGET, run
from support.texts import text_layers, tokens

from more_hf_bench.methods.diffusion.cure import eraser


def test_cure_projects_orthogonal_embeddings_out_and_spares_shared_ones():
    e = torch.eye(3).double()
    assert torch.allclose(eraser(e[:1], e[1:2], 2.0), torch.diag(torch.tensor([0.0, 1, 1]).double()))
    assert torch.allclose(eraser(e[:1], 5 * e[:1], 2.0), e)
    # two directions with half of the energy each: λ = 2 · ½ / (½ + 1)
    assert torch.allclose(eraser(e[:2], e[:0], 2.0), torch.diag(torch.tensor([1 / 3, 1 / 3, 1]).double()))
    # P_f P_r with a retained direction at 45 degrees
    both = eraser(e[:1], (e[:1] + e[1:2]), 2.0)
    assert torch.allclose(both, torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]).double())


def test_cure_is_the_formula_on_content_tokens(tiny_sd):
    pipe = tiny_sd("2")
    before = text_layers(pipe)

    def projector(names):
        rows = np.concatenate(
            [features[1 : used - 1].numpy() for features, used in (tokens(pipe, name) for name in names)]
        )
        values, vectors = np.linalg.eigh(rows.T @ rows)  # squares of the singular values
        share = values.clip(0) / values.sum()
        return vectors @ np.diag(2 * share / (share + 1)) @ vectors.T

    P_f, P_r = projector([CONCEPT]), projector([TARGET, *RETAIN])
    run("cure", pipe)
    for name, W in text_layers(pipe).items():
        assert np.allclose(W.numpy(), before[name].numpy() @ (np.eye(32) - (P_f - P_f @ P_r)), atol=1e-6)
