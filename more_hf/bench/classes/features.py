"""What a classifier's head reads, collected once: everything that happens at the head is then measured without the backbone.

The hooks of a head (an erasure's routing, a baseline's linear map) run again on cached inputs, so a stochastic layer can be asked as
often as one likes, at the price of a matrix product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import tqdm
from safetensors.torch import save_model
from torch import Tensor, nn

from ...api import get_erasure
from ...classification.erasure import ClassErasure
from ...classification.heads import evaluating
from ...core.errors import MoreError
from ..splits import ImageSet, Splits


CHUNK = 100_000  # samples that go through the head's hooks at once


@dataclass(frozen=True)
class Cached:
    """The inputs of a model's head before its hooks, `(n, d)` float32 on the CPU, and the head with its hooks.

    Attributes:
        inputs (`dict[str, Tensor]`): by part, `"train"` and `"test"`.
        model, head (`nn.Module`): the classifier and its last linear layer.
    """

    inputs: dict[str, Tensor]
    model: nn.Module
    head: nn.Module

    @property
    def routed(self) -> ClassErasure | None:
        """The erasure that routes what the head reads, each time that it is asked. One at an inner module routed before the cache."""
        erasure = get_erasure(self.model)
        here = erasure is not None and erasure.router is not None and erasure.request.at is None
        return erasure if here else None

    @property
    def is_random(self) -> bool:
        """Whether the head's hooks draw: the same input then reads differently each time."""
        return self.routed is not None and self.routed.router == "random"

    def features(self, part: str, *, passes: int = 1, draw: int = 0) -> Tensor:
        """`(n, d)`, what the head's weight reads: the mean over `passes` calls. `draw` gives every sample streams of its own."""
        return self._ask(part, passes, draw)[0]

    def logits(self, part: str, *, passes: int = 1, draw: int = 0) -> Tensor:
        """`(n, k)`: the head's weight on the same features that `features` returns."""
        return self._ask(part, passes, draw)[1]

    def experts(self, part: str) -> Tensor | None:
        """`(n,)`: the expert that each sample takes in draw 0, or `None` without a router."""
        erasure = self.routed
        if erasure is None:
            return None
        _seed(erasure, 0, len(self.inputs[part]))
        return erasure.hook.router(self.inputs[part].to(self._device)).cpu()

    @property
    def _device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def _ask(self, part: str, passes: int, draw: int) -> tuple[Tensor, Tensor]:
        erasure, found = self.routed, []
        seen: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # last: after the other hooks
        try:
            for start in range(0, len(self.inputs[part]), CHUNK):
                z = self.inputs[part][start : start + CHUNK].to(self._device)
                if erasure is not None:
                    _seed(erasure, start, len(z), draw)
                seen.clear()
                for _ in range(passes):
                    self.head(z)
                found.append(torch.stack(seen).mean(0))
        finally:
            handle.remove()
        features = torch.cat(found)
        logits = nn.functional.linear(features, self.head.weight, self.head.bias)
        return features.float().cpu(), logits.float().cpu()


def cache(model: nn.Module, head: nn.Module, parts: dict[str, ImageSet], *, batch_size: int = 100, desc: str = "features") -> Cached:
    """One pass of the images through the model in evaluation mode, on its device; routing at an inner module draws from fixed seeds.

    Raises `MoreError` if the head is called other than once per batch with features `(batch, d)`.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].float().cpu()), prepend=True)
    device, erasure, inputs = next(model.parameters()).device, get_erasure(model), {}
    bar = tqdm(total=sum(map(len, parts.values())), desc=desc, unit="image", leave=False)
    try:
        with evaluating(model):
            for name, images in parts.items():
                seen.clear()
                for start, batch in zip(range(0, len(images), batch_size), images.loader(batch_size), strict=True):
                    if erasure is not None and erasure.router is not None:
                        _seed(erasure, start, len(batch["labels"]))
                    model(batch["pixel_values"].to(device))
                    bar.update(len(batch["labels"]))
                inputs[name] = torch.cat(seen)
                if inputs[name].shape != (len(images), head.in_features):
                    raise MoreError(
                        f"The head read {tuple(inputs[name].shape)} for {len(images)} images, not ({len(images)}, {head.in_features}): "
                        "it must be called once per batch, with one feature per image."
                    )
    finally:
        handle.remove()
        bar.close()
    return Cached(inputs, model, head)


def _seed(erasure: ClassErasure, start: int, count: int, draw: int = 0) -> None:
    """Streams of the samples from `start` on, others in each draw."""
    erasure.hook.router.reset(range((draw << 32) + start, (draw << 32) + start + count))


def same_backbone(model: nn.Module, other: nn.Module, head: str) -> bool:
    """Whether two models give their heads the same inputs for sure: all tensors outside the head equal, no hook outside it."""
    if any(module._forward_pre_hooks or module._forward_hooks for name, module in model.named_modules() if name != head):
        return False
    mine, theirs = model.state_dict(), other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items() if not name.startswith(f"{head}."))


@dataclass(frozen=True, eq=False)
class FeatureSet(ImageSet):
    """What the head reads of each image, `(N, d)`, in place of the images."""

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """`pixel_values` `(…, d)` and `labels` `(…)` int64."""
        index = torch.as_tensor(index)
        return {"pixel_values": self.images[self.rows[index]], "labels": self.labels[index]}


def splits_of_features(splits: Splits, train: ImageSet, inputs: Tensor) -> Splits:
    """The splits with `f` and `r` as `FeatureSet`s, from the head's inputs `(n, d)` for the n images of `train`."""
    features = torch.zeros(int(train.rows.max()) + 1, inputs.shape[1]).index_copy_(0, train.rows, inputs)
    parts = {name: getattr(splits, name) for name in ("f", "r")}
    return replace(splits, **{name: FeatureSet(features, part.labels, part.rows, part.image_size) for name, part in parts.items()})


@contextmanager
def head_only(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """The model takes features for images: only its head, with its hooks, is called."""
    model.forward = head.__call__
    try:
        yield
    finally:
        del model.forward


@contextmanager
def reloaded(model: nn.Module) -> Iterator[nn.Module]:
    """What anyone gets who loads what `save_pretrained` wrote: the weights, and no hook.

    Written here as `save_pretrained` writes it, which under `accelerate launch` does so in the first process only.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        save_model(model, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
        yield type(model).from_pretrained(folder).eval()
