"""The inputs of a classifier's head, collected once: the head is then measured without the backbone.

The hooks of a head (an erasure's routing, a baseline's linear map) run again on the collected inputs, so a
stochastic layer can be asked any number of times at the price of a matrix product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import tqdm
from safetensors.torch import save_model
from torch import Tensor, nn

from more_hf.api import get_erasure
from more_hf.classification.erasure import ClassErasure
from more_hf.classification.heads import evaluating
from more_hf.core.errors import MoreError

from ..splits import ImageSet, Splits


CHUNK = 100_000  # samples that go through the head's hooks at once


@contextmanager
def inputs_of(head: nn.Module, *, before_hooks: bool = False) -> Iterator[list[Tensor]]:
    """Collect the input of each call of a head: as its weight reads it, or before its other hooks."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=before_hooks)
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class Cached:
    """A classifier's head with its hooks, and what it reads before them.

    Attributes:
        inputs (`Mapping[str, Tensor]`): part, `"train"` or `"test"`, to `(n, d)`, float32 on the CPU.
        model, head (`nn.Module`): the classifier and its last linear layer.
    """

    inputs: Mapping[str, Tensor]
    model: nn.Module
    head: nn.Module

    @property
    def routed(self) -> ClassErasure | None:
        """The erasure that routes the head's input at each call.

        An erasure at an inner module is not one: it has routed already when the inputs were collected.
        """
        erasure = get_erasure(self.model)
        if erasure is None or erasure.router is None or erasure.request.at is not None:
            return None
        return erasure

    @property
    def is_random(self) -> bool:
        """Whether the head's hooks draw, so that the same input gives other features each time."""
        return self.routed is not None and self.routed.router == "random"

    def features(self, part: str, *, passes: int = 1, draw: int = 0) -> Tensor:
        """What the head's weight reads, `(n, d)`: the mean over `passes` calls.

        Each `draw` gives every sample a random stream of its own.
        """
        return self._ask(part, passes, draw)[0]

    def logits(self, part: str, *, passes: int = 1, draw: int = 0) -> Tensor:
        """The logits `(n, k)` of what `features` returns."""
        return self._ask(part, passes, draw)[1]

    def experts(self, part: str, *, draw: int = 0) -> Tensor | None:
        """The expert of each sample `(n,)` in a draw, or `None` without a router."""
        erasure = self.routed
        if erasure is None:
            return None
        _seed(erasure, 0, len(self.inputs[part]), draw)
        return erasure.hook.router(self.inputs[part].to(self.head.weight.device)).cpu()

    @torch.no_grad()
    def _ask(self, part: str, passes: int, draw: int) -> tuple[Tensor, Tensor]:
        erasure, means = self.routed, []
        with inputs_of(self.head) as seen:
            for start in range(0, len(self.inputs[part]), CHUNK):
                z = self.inputs[part][start : start + CHUNK].to(self.head.weight.device)
                if erasure is not None:
                    _seed(erasure, start, len(z), draw)
                seen.clear()
                for _ in range(passes):
                    self.head(z)
                means.append(torch.stack(seen).mean(0))
        features = torch.cat(means)
        logits = nn.functional.linear(features, self.head.weight, self.head.bias)
        return features.float().cpu(), logits.float().cpu()


def cache(
    model: nn.Module,
    head: nn.Module,
    parts: Mapping[str, ImageSet],
    *,
    batch_size: int = 100,
    desc: str = "features",
) -> Cached:
    """Collect the head's inputs in one pass in evaluation mode, on the model's device.

    Routing at an inner module draws from fixed seeds.

    Raises:
        `MoreError`: unless the head is called once per batch, with features `(batch, d)`.
    """
    device, erasure, inputs = next(model.parameters()).device, get_erasure(model), {}
    bar = tqdm(total=sum(map(len, parts.values())), desc=desc, unit="image", leave=False)
    with evaluating(model), inputs_of(head, before_hooks=True) as seen:
        for name, images in parts.items():
            collected, start = [], 0
            for batch in images.loader(batch_size):
                count = len(batch["labels"])
                if erasure is not None and erasure.router is not None:
                    _seed(erasure, start, count)
                seen.clear()
                model(batch["pixel_values"].to(device))
                collected += [z.float().cpu() for z in seen]
                start += count
                bar.update(count)
            inputs[name] = torch.cat(collected)
            if inputs[name].shape != (len(images), head.weight.shape[1]):
                raise MoreError(
                    f"The head read {tuple(inputs[name].shape)} for {len(images)} images, not "
                    f"({len(images)}, {head.weight.shape[1]}): it must be called once per batch, with one "
                    "feature per image."
                )
    bar.close()
    return Cached(inputs, model, head)


def invert_two_queries(cached: Cached, part: str) -> Tensor:
    """The features `(n, d)` that explain two answers of a router best, by the experts that gave them.

    z solves [E_a; E_b] z = [z_a; z_b] in least squares: exactly where the targets of a and b differ in as
    many directions as classes were forgotten. Where one expert gave both, what it removed stays missing.
    """
    remap = cached.routed.remap
    identity = torch.eye(len(remap.prototypes.matrix), dtype=torch.float64)
    experts = [identity + remap.shift(e) @ remap.D_F for e in range(remap.num_experts)]
    answers = [cached.features(part, draw=draw).double() for draw in (0, 1)]
    a, b = (cached.experts(part, draw=draw) for draw in (0, 1))
    found = torch.empty_like(answers[0])
    for i, j in torch.stack([a, b], dim=1).unique(dim=0).tolist():
        rows = (a == i) & (b == j)
        both = torch.cat([answers[0][rows], answers[1][rows]], dim=1)
        found[rows] = both @ torch.linalg.pinv(torch.cat([experts[i], experts[j]])).T
    return found.float()


def _seed(erasure: ClassErasure, start: int, count: int, draw: int = 0) -> None:
    """Give each sample from `start` on its random stream, another one in each draw."""
    first = (draw << 32) + start
    erasure.hook.router.reset(range(first, first + count))


def same_backbone(model: nn.Module, other: nn.Module, head: str) -> bool:
    """Whether two models certainly give their heads the same inputs: equal tensors, no hook outside."""
    for name, module in model.named_modules():
        if name != head and (module._forward_pre_hooks or module._forward_hooks):
            return False
    theirs = other.state_dict()
    return all(
        torch.equal(tensor, theirs[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{head}.")
    )


@dataclass(frozen=True, eq=False)
class FeatureSet(ImageSet):
    """What the head reads of each image, `(N, d)`, in place of the images."""

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """`pixel_values` `(…, d)` and `labels` `(…)` int64."""
        index = torch.as_tensor(index)
        return {"pixel_values": self.images[self.rows[index]], "labels": self.labels[index]}


def splits_of_features(splits: Splits, train: ImageSet, inputs: Tensor) -> Splits:
    """Replace the images of `f` and `r` by the head's inputs `(n, d)` for the n images of `train`."""
    features = torch.zeros(int(train.rows.max()) + 1, inputs.shape[1])
    features.index_copy_(0, train.rows, inputs)

    def part(images: ImageSet) -> FeatureSet:
        return FeatureSet(features, images.labels, images.rows, images.image_size)

    return replace(splits, f=part(splits.f), r=part(splits.r))


@contextmanager
def head_only(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Let the model take features for images: a call runs only its head, with the head's hooks."""
    model.forward = head.__call__
    try:
        yield
    finally:
        del model.forward


@contextmanager
def reloaded(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model that `save_pretrained` and `from_pretrained` give: the weights, without a hook.

    `save_pretrained` itself writes only in the first process of `accelerate launch`, so this writes the same
    files.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        yield type(model).from_pretrained(folder).eval()
