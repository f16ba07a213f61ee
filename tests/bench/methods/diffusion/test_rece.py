"""RECE: its two steps layer by layer."""

import torch
from support.closed_forms import CONCEPT, RETAIN, TARGET, paper_sequences, run, uce_layer
from support.texts import text_layers, tokens

from more_hf_bench.methods.diffusion.rece import adversarial_embeddings


def test_rece_embedding_has_no_gradient_left():
    torch.manual_seed(0)
    W = torch.randn(3, 6, 5, dtype=torch.float64)  # three layers
    A, C = torch.randn(5, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = adversarial_embeddings(torch.einsum("lod,loe->de", W, W), A, C, rho=0.3).requires_grad_()
    loss = ((found @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (found**2).sum()
    assert torch.autograd.grad(loss, found)[0].abs().max() < 1e-9
    assert loss < ((C @ (W @ A).transpose(1, 2) - C @ W.transpose(1, 2)) ** 2).sum() + 0.3 * (C**2).sum()


def test_rece_is_its_two_steps_layer_by_layer(tiny_sd):
    pipe = tiny_sd("1")
    original = text_layers(pipe)
    kept = torch.cat([tokens(pipe, name)[0] for name in ("", TARGET, *RETAIN)])
    old, new = paper_sequences(pipe, CONCEPT, TARGET)
    first = {name: uce_layer(W, old, new, kept, 0.5, 1.0, 0.1) for name, W in original.items()}
    c, g = tokens(pipe, CONCEPT)[0], tokens(pipe, TARGET)[0]
    left = 1e-3 * torch.eye(c.shape[1]).double() + sum(first[name].T @ first[name] for name in first)
    adversarial = (torch.inverse(left) @ sum(first[name].T @ original[name] for name in first) @ c.T).T
    run("rece", pipe)
    for name, W in text_layers(pipe).items():
        assert torch.allclose(W, uce_layer(first[name], adversarial, g, kept, 0.1, 1.0, 0.1), atol=1e-5)
        assert not torch.allclose(W, first[name], atol=1e-4)


def test_rece_without_epochs_is_the_paper_variant_of_uce(tiny_sd):
    a, b = tiny_sd("1"), tiny_sd("1")
    run("rece", a, epochs=0)
    run("uce", b, variant="paper", preserve_scale=0.1)
    assert all(
        torch.equal(x, y) for x, y in zip(text_layers(a).values(), text_layers(b).values(), strict=True)
    )
