"""Ours without prototype orthogonalisation."""

import numpy as np
from support.closed_forms import CONCEPT, RETAIN, TARGET, run
from support.texts import last, text_layers


def test_without_po_sends_the_concept_and_does_not_spare_the_others(tiny_sd):
    pipe = tiny_sd("1")
    before = text_layers(pipe)
    run("more-without-po", pipe, tokens="last")
    c, g, r = (last(pipe, name).numpy() for name in (CONCEPT, TARGET, RETAIN[0]))
    for name, W in text_layers(pipe).items():
        W, old = W.numpy(), before[name].numpy()
        assert np.allclose(W, old + np.outer(old @ (g - c), c) / (c @ c), atol=1e-6)
        assert np.allclose(W @ c, old @ g, atol=1e-5)
        assert np.linalg.norm(W @ r - old @ r) > 1e-2 * np.linalg.norm(old @ r)
