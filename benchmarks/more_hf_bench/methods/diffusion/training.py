"""The training loop of the methods that train: a float32 copy learns, the pipeline gets its weights at the
end, and a run that was stopped goes on from its checkpoint."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from more_hf.core.errors import SiteNotFoundError
from more_hf.core.files import replacing
from more_hf.core.request import check_choice
from more_hf.core.site import fingerprint
from more_hf.diffusion.sites import find_denoiser, find_sites

from .pipelines import is_quiet
from .weights import Trained, write_weights


LAYERS = ("x", "x-strict", "u", "all")


class Checkpoint:
    """The state of a run, in a file of its own inside a folder: other concepts, settings or base weights,
    another file.

    Args:
        folder (`str` or `Path`, *optional*): `None` keeps nothing.
        facts (`Mapping`): what the run depends on, JSON-able, with its `"method"`.
    """

    def __init__(self, folder: str | Path | None, facts: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else Path(folder) / f"{facts['method']}-{digest[:16]}.pt"
        self.facts = dict(facts)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or `None`."""
        if self.path is None or not self.path.is_file():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the file at once: a run that is killed leaves the last whole checkpoint."""
        if self.path is not None:
            with replacing(self.path) as draft:
                torch.save({**state, "facts": self.facts}, draft)


def trainable_names(pipe: DiffusionPipeline, layers: str) -> list[str]:
    """Parameters of the denoiser to train, in its order.

    Args:
        pipe: the pipeline.
        layers (`str`): `"x"`, every attention that reads text; `"x-strict"`, its keys and values alone;
            `"u"`, everything else; `"all"`.

    Raises:
        `MoreError`: for another word. `SiteNotFoundError`: for a denoiser that cannot be edited or is
            offloaded.
    """
    check_choice("layers", layers, LAYERS)
    denoiser = find_denoiser(pipe)
    sites = find_sites(pipe, denoiser)
    modules = denoiser.module.named_modules()
    attentions = [name for name, m in modules if isinstance(m, Attention) and m.is_cross_attention]
    prefixes = tuple(f"{name}." for name in (sites if layers == "x-strict" else attentions))
    parameters = dict(denoiser.module.named_parameters())
    names = list(parameters)
    if layers != "all":
        names = [name for name in names if name.startswith(prefixes) == (layers != "u")]
    if offloaded := [name for name in names if parameters[name].is_meta]:
        raise SiteNotFoundError(
            f"`{offloaded[0]}` is offloaded and cannot be trained. Load the pipeline without offloading."
        )
    return names


def float_copy(pipe: DiffusionPipeline) -> nn.Module:
    """A copy of the denoiser in float32 on the pipeline's device, without gradients."""
    student = copy.deepcopy(find_denoiser(pipe).module)
    return student.float().requires_grad_(False).to(pipe._execution_device)


def with_gradients(student: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of these names, which get gradients from now on."""
    parameters = dict(student.named_parameters())
    return [parameters[name].requires_grad_() for name in names]


def base_facts(pipe: DiffusionPipeline, names: Sequence[str]) -> dict[str, str]:
    """The fingerprint of the weights that a run starts from."""
    parameters = dict(find_denoiser(pipe).module.named_parameters())
    return {"base": fingerprint({name: parameters[name].detach() for name in names})}


def train(
    pipe: DiffusionPipeline,
    student: nn.Module,
    names: Sequence[str],
    loss: Callable[[torch.Generator], Tensor],
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    save_every: int,
) -> None:
    """Minimise `loss(generator)` over the parameters `names` of `student`, then write them into the pipeline.

    The `iterations` and the `seed` are among the checkpoint's facts. Everything random is drawn from one
    generator, whose state is part of the checkpoint: a run that was stopped and goes on ends with the same
    weights. The pipeline is not touched before the last step.

    Raises:
        `IncompatibleBaseError`: if the result is not finite; the pipeline is unchanged then.
    """
    facts = checkpoint.facts
    iterations = facts["iterations"]
    generator = torch.Generator().manual_seed(facts["seed"])
    parameters = dict(student.named_parameters())
    trained = {name: parameters[name] for name in names}
    done = 0
    if (state := checkpoint.load()) is not None:
        done = state["iteration"]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    desc = f"{facts['method']} without {', '.join(facts['concepts'])}"
    begun = min(done, iterations)
    bar = tqdm(total=iterations, initial=begun, desc=desc, unit="step", disable=is_quiet(pipe))
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
                    "weights": {name: parameter.detach() for name, parameter in trained.items()},
                    "optimizer": optimizer.state_dict(),
                    "generator": generator.get_state(),
                }
            )
    bar.close()
    base = dict(find_denoiser(pipe).module.named_parameters())
    values = {name: parameter.detach() for name, parameter in trained.items()}
    write_weights(
        {name: Trained(base[name]) for name in names}, values, remedy="Choose a smaller learning rate."
    )
