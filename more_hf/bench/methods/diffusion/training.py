"""The training loop of the methods that train: a float32 copy learns, the pipeline gets its weights at the end, any stop is resumed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ....core.erasure import fingerprint
from ....core.errors import IncompatibleBaseError, MoreError, TargetNotFoundError
from ....diffusion.sites import find_denoiser, find_sites
from .progress import is_quiet


LAYERS = ("x", "x-strict", "u", "all")


class Checkpoint:
    """What a run has so far, in a file of its own inside a folder: other concepts, settings or base weights, another file.

    Args:
        folder (`str` or `Path`, *optional*): `None` keeps nothing.
        facts (`Mapping`): what the run depends on, JSON-able, with its `"method"`.
    """

    def __init__(self, folder: str | Path | None, facts: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else Path(folder) / f"{facts['method']}-{digest[:16]}.pt"
        self.facts = dict(facts)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or `None`."""
        if self.path is None or not self.path.is_file():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write beside the file, then rename: a run that is killed leaves the last whole checkpoint."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            torch.save({**state, "facts": self.facts}, part)
            os.replace(part, self.path)


def trainable_names(pipe: DiffusionPipeline, layers: str) -> list[str]:
    """Parameters of the denoiser to train, in its order.

    `"x"`: every attention that reads text; `"x-strict"`: its keys and values alone; `"u"`: everything else; `"all"`. Raises `MoreError`
    for another word, and `TargetNotFoundError` for a denoiser that cannot be edited or is offloaded.
    """
    if layers not in LAYERS:
        raise MoreError(f"Unknown layers {layers!r}. Choose one of {', '.join(map(repr, LAYERS))}.")
    denoiser = find_denoiser(pipe)
    sites = find_sites(pipe, denoiser)
    attentions = [name for name, m in denoiser.module.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    inside = tuple(f"{name}." for name in (sites if layers == "x-strict" else attentions))
    named = dict(denoiser.module.named_parameters())
    names = [name for name in named if layers == "all" or name.startswith(inside) == (layers != "u")]
    if offloaded := [name for name in names if named[name].is_meta]:
        raise TargetNotFoundError(f"`{offloaded[0]}` is offloaded and cannot be trained. Load the pipeline without offloading.")
    return names


def float_copy(pipe: DiffusionPipeline) -> nn.Module:
    """The denoiser in float32 on the pipeline's device, a copy of its own, without gradients."""
    return copy.deepcopy(find_denoiser(pipe).module).float().requires_grad_(False).to(pipe._execution_device)


def with_gradients(student: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of these names, which get gradients from now on."""
    parameters = dict(student.named_parameters())
    return [parameters[name].requires_grad_() for name in names]


def base_facts(pipe: DiffusionPipeline, names: Sequence[str]) -> dict[str, str]:
    """The fingerprint of the weights that a run starts from."""
    named = dict(find_denoiser(pipe).module.named_parameters())
    return {"base": fingerprint({name: named[name].detach() for name in names})}


def train(
    pipe: DiffusionPipeline,
    student: nn.Module,
    names: Sequence[str],
    loss: Callable[[torch.Generator], Tensor],
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    *,
    iterations: int,
    seed: int,
    save_every: int,
    desc: str,
) -> None:
    """Minimise `loss(generator)` over the parameters `names` of `student`, then write them into the pipeline's denoiser.

    Everything random is drawn from one generator, whose state is part of the checkpoint: a run that was stopped and goes on ends with
    the same weights. The pipeline is not touched before the last step, and not at all if the result is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(student.named_parameters())
    done = 0
    if (held := checkpoint.load()) is not None:
        done = held["iteration"]
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(held["weights"][name])
        optimizer.load_state_dict(held["optimizer"])
        generator.set_state(held["generator"])
    bar = tqdm(total=iterations, initial=min(done, iterations), desc=desc, unit="step", disable=is_quiet(pipe))
    while done < iterations:
        with torch.enable_grad():
            value = loss(generator)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
        done += 1
        bar.set_postfix(loss=f"{float(value.detach()):.4f}")
        bar.update(1)
        if done % save_every == 0 or done == iterations:
            checkpoint.save(
                {
                    "iteration": done,
                    "weights": {name: parameters[name].detach() for name in names},
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
            )
    bar.close()
    write_parameters(find_denoiser(pipe).module, {name: parameters[name].detach() for name in names})


@torch.no_grad()
def write_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module's parameters, in their dtype: all of them or none. Raises `IncompatibleBaseError` unless finite."""
    named = dict(module.named_parameters())
    cast = {name: value.to(named[name].dtype) for name, value in values.items()}
    if bad := [name for name, value in cast.items() if not torch.isfinite(value).all()]:
        raise IncompatibleBaseError(f"The trained `{bad[0]}` is not finite: the learning rate is too high. Nothing was changed.")
    before = {name: named[name].detach().clone() for name in cast}
    try:
        for name, value in cast.items():
            named[name].copy_(value)
    except BaseException:
        for name, value in before.items():
            named[name].copy_(value)
        raise
