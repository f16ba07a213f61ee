"""CARE: subtract from the values of text what sets the concept apart from the names to keep."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from .midsteer import cross_attentions
from .pipelines import AtInference
from .texts import Concepts, Retained, Targets, Texts, name_roles


def care(
    pipe: DiffusionPipeline,
    concepts: Concepts,
    *,
    remap_to: Targets,
    retain: Retained,
    gamma: float = 0.5,
    threshold: float = 0.93,
    steepness: float = 100.0,
    ceiling: float = 2.0,
) -> AtInference:
    """Erase with CARE (arXiv 2607.05274): a gated subtraction from the values of the attentions to text.

    For Stable Diffusion. Source: its direction d = Σ⁻¹ t, where t is the concept's value and Σ = BᵀB / M + γI
    that of M retained names, and AdaVD's gate. A name's value is that of its last token, for every position
    but the begin token's, as released; γ is a share of the retained values' mean squared length, as there,
    where their direction has length 1. It has no target: `remap_to` only joins the retained names, and
    without either d = t, which is AdaVD. The pipeline that is returned has a denoiser of its own, with hooks:
    nothing is erased at rest.

    Args:
        gamma (`float`, defaults to 0.5): γ (published: 0.2 where names are far apart, else 0.5).
        threshold (`float`), steepness (`float`), ceiling (`float`): the gate is a sigmoid of the cosine of
            concept and value: half of `ceiling` at the threshold (published: 0.93, 100 and 2).
    """
    roles = name_roles(concepts, remap_to, retain)
    made = AtInference.around(pipe, forget=roles.forget)
    made.register_modules(unet=copy.deepcopy(pipe.unet))
    texts = Texts(pipe)
    forget, keep = texts.last_tokens(roles.forget), texts.last_tokens(roles.keep)
    for part in cross_attentions(made.unet).values():
        weight = part.to_v.weight.detach().double().cpu()
        t, B = forget @ weight.T, keep @ weight.T
        part.to_v.register_forward_hook(
            Subtraction(t, directions(t, B, gamma), threshold, steepness, ceiling)
        )
    return made


def directions(t: Tensor, B: Tensor, gamma: float) -> Tensor:
    """d = Σ⁻¹ t of each value t `(n, d)`, with Σ = BᵀB / M + γ tr(BᵀB / M) I over values B `(M, d)`."""
    if not len(B):
        return t
    moment = B.T @ B / len(B)
    return torch.linalg.solve(moment + gamma * moment.trace() * torch.eye(len(moment)).to(moment), t.T).T


@dataclass(frozen=True)
class Subtraction:
    """Takes g(cos(t, v)) (d · v / d · d) d from each value v but the first, for every t and d `(n, d)`."""

    t: Tensor
    d: Tensor
    threshold: float
    steepness: float
    ceiling: float

    def __call__(self, module: nn.Module, args: tuple, values: Tensor) -> Tensor:
        """The values `(batch, positions, d)` without the concepts; a hook of the layer that gives them."""
        t, d = self.t.to(values), self.d.to(values)
        v = values[:, 1:]
        alike = cosine_similarity(v[..., None, :], t, dim=-1)
        gate = self.ceiling * torch.sigmoid(self.steepness * (alike - self.threshold))
        shares = v @ d.T / d.square().sum(-1)
        return torch.cat([values[:, :1], v - (gate * shares) @ d], dim=1)
