"""The one training loop of the methods that train, and what they share around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from more_hf.classification.heads import logits_of
from more_hf.core.errors import IncompatibleBaseError

from ...splits import ImageSet, Splits


Batch = tuple[Tensor, Tensor]  # images (batch, channels, height, width) and labels (batch,)


def batches(loader: Iterable[dict[str, Tensor]], model: nn.Module) -> Iterator[Batch]:
    """Images and labels of a loader's batches, on the model's device. The caller's random state is not
    touched."""
    device = next(model.parameters()).device
    # A DataLoader without a generator draws from the global one when it starts.
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
    for batch in iterator:
        yield batch["pixel_values"].to(device), batch["labels"].to(device)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits `(batch, num_classes)` for images."""
    return logits_of(model(images))


def entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of a batch."""
    return cross_entropy(predict(model, images), labels)


def sgd(parameters: Iterable[nn.Parameter], lr: float, *, weight_decay: float = 5e-4) -> torch.optim.SGD:
    """The field's optimiser: momentum 0.9, a constant rate (its first decay comes after the ten epochs of
    every method here)."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)


@dataclass(frozen=True)
class Training:
    """How a method takes gradient steps: the settings of every method that trains."""

    name: str  # of the method
    lr: float  # a constant learning rate
    epochs: int  # passes over the data
    batch_size: int  # images in a step
    seed: int = 0  # of shuffles and dropout

    def loader(self, images: ImageSet, further: int = 0) -> DataLoader:
        """Shuffled batches; a method that shuffles several sets takes a `further` seed for each."""
        return images.loader(self.batch_size, seed=self.seed + further)

    def run(
        self,
        model: nn.Module,
        steps: Callable[[int], Iterable[tuple[Any, ...]]],
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> nn.Module:
        """Minimise `loss(*step)` over the steps of each epoch, in training mode; return the model in
        evaluation mode.

        BatchNorm statistics move, as in the sources. Dropout draws from `seed`; the caller's random state is
        not touched.

        Args:
            steps (`Callable`): from the epoch, 0 on, to the arguments of `loss` in each step.
            optimizer (`Optimizer`, *optional*): `sgd` by default.
            before_step, after_step (`Callable`, *optional*): called around each update, when the gradients
                are there.

        Raises:
            `IncompatibleBaseError`: if a parameter is not finite at the end.
        """
        optimizer = sgd(model.parameters(), self.lr) if optimizer is None else optimizer
        model.train()
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(self.seed)
            for epoch in tqdm(range(self.epochs), desc=self.name, unit="epoch", leave=False):
                for step in steps(epoch):
                    value = loss(*step)
                    optimizer.zero_grad(set_to_none=True)
                    value.backward()
                    if before_step is not None:
                        before_step()
                    optimizer.step()
                    if after_step is not None:
                        after_step()
        check_finite(model, self.name)
        return model.eval()


def taking(kind: type, **defaults: Any) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Make a method of a function of model, splits, a `kind` and settings of its own: in place of the third,
    the method takes the fields of this dataclass, with these defaults or its own."""
    shared = {field.name: defaults.get(field.name, field.default) for field in fields(kind)}
    del shared["name"]

    def method_of(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        @wraps(function)
        def method(model: nn.Module, splits: Splits, **settings: Any) -> nn.Module:
            given = {name: settings.pop(name, default) for name, default in shared.items()}
            return function(model, splits, kind(function.__name__.replace("_", "-"), **given), **settings)

        model, splits, _, *own = signature(function).parameters.values()
        common = [Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in shared.items()]
        method.__signature__ = Signature([model, splits, *common, *own])
        return method

    return method_of


def check_finite(model: nn.Module, method: str) -> None:
    """Raise `IncompatibleBaseError`, naming the parameter, unless all are finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise IncompatibleBaseError(
                f"After {method}, `{name}` is not finite: the learning rate is too high. "
                "Choose a smaller one."
            )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A teacher: a copy in evaluation mode without gradients."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def reinitialised(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with new random weights on the same device: a function of `seed`; the global
    random state is not touched.

    A Transformers model is built again from its configuration; of any other, every module with
    `reset_parameters` is reset."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if hasattr(model, "config"):
            return type(model)(copy.deepcopy(model.config)).to(next(model.parameters()))
        model = copy.deepcopy(model)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model
