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

import numpy as np
import torch
from accelerate.utils import tqdm
from safetensors.torch import save_model
from torch import Tensor, nn

from more_hf.api import get_erasure
from more_hf.classification.erasure import ClassErasure
from more_hf.classification.heads import evaluating
from more_hf.core.errors import MoreError
from more_hf.core.files import replacing
from more_hf.core.remap import Remap

from ..splits import ImageSet, Splits


CHUNK = 100_000  # samples that go through the head's hooks at once, at most
SHIFTS = 10**9  # numbers in the shifts of these samples' experts, at most
ANSWERS = 1_000  # pairs of answers that are inverted at once


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
    """A classifier's head with its hooks, and what it reads before them."""

    # part, `"train"` or `"test"`, to `(n, d)`, float32 on the CPU, or in a file that is mapped into memory
    inputs: Mapping[str, Tensor]
    # model, head: the classifier and its last linear layer
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
        erasure, means, chunk = self.routed, [], CHUNK
        if erasure is not None:
            chunk = min(CHUNK, SHIFTS // erasure.remap.D_F.numel())
        with inputs_of(self.head) as seen:
            for start in range(0, len(self.inputs[part]), chunk):
                z = self.inputs[part][start : start + chunk].to(self.head.weight.device)
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
    folder: Path | None = None,
    desc: str = "features",
) -> Cached:
    """Collect the head's inputs in one pass in evaluation mode, on the model's device.

    Routing at an inner module draws from fixed seeds. With a `folder`, each part is a file there, which the
    next call only opens.

    Raises:
        `MoreError`: unless the head is called once per batch, with features `(batch, d)`.
    """
    device, erasure, inputs = next(model.parameters()).device, get_erasure(model), {}
    bar = tqdm(total=sum(map(len, parts.values())), desc=desc, unit="image", leave=False)
    with evaluating(model), inputs_of(head, before_hooks=True) as seen:
        for name, images in parts.items():
            path = None if folder is None else folder / f"features-{name}.npy"
            if path is not None and path.is_file():
                inputs[name] = mapped(path)
                continue
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
            if path is not None:
                with replacing(path) as draft, draft.open("wb") as file:
                    np.save(file, inputs[name].numpy())
                inputs[name] = mapped(path)
    bar.close()
    return Cached(inputs, model, head)


def mapped(path: Path) -> Tensor:
    """The numbers of a file of NumPy's, which are read from the disk as they are asked for."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))  # copied where somebody writes: torch asks for that


def invert_two_queries(cached: Cached, part: str) -> Tensor:
    """The features `(n, d)` that explain two answers of a router best, by the experts that gave them."""
    remap, device = cached.routed.remap, cached.head.weight.device
    answers = [cached.features(part, draw=draw).split(ANSWERS) for draw in (0, 1)]
    experts = [cached.experts(part, draw=draw).split(ANSWERS) for draw in (0, 1)]
    found = [
        explain_two_answers(remap, *(each.to(device) for each in both)).float().cpu()
        for both in zip(*answers, *experts, strict=True)
    ]
    return torch.cat(found)


def explain_two_answers(remap: Remap, z_a: Tensor, z_b: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Solve E_a z = z_a and E_b z = z_b for the shortest z, `(n, d)`, float64, from two answers to each
    sample and the experts that gave them, `(n,)`.

    With m = D_F z and the shift S_e of expert e, an answer is z + S_e m. So all that is unknown are the f
    numbers m: what two answers determine of them is solved for, and z is made of m and the answers' mean. It
    is the sample's feature where the targets of both experts differ in as many directions as prototypes are
    forgotten. Where one expert gave both answers, what it removed stays missing.
    """
    D, shifts = remap.D_F.to(z_a.device), remap.shifts.to(z_a.device)
    S_a, S_b = shifts[a], shifts[b]  # (n, d, f)
    # 1. The mean of both answers is z + S m, their difference T m.
    S, T = (S_a + S_b) / 2, S_a - S_b
    mean, difference = ((z_a + z_b) / 2).double()[..., None], (z_a - z_b).double()[..., None]
    # 2. D_F times the mean is C m. Together, C and T determine m in the directions with an eigenvalue.
    C = torch.eye(len(D), dtype=D.dtype, device=D.device) + D @ S
    values, vectors = torch.linalg.eigh(C.mT @ C + T.mT @ T)
    known = values > 1e-10 * S.square().sum((1, 2))[:, None]
    inverse = torch.where(known, 1 / values, 0.0)[..., None]
    m = vectors @ (inverse * (vectors.mT @ (C.mT @ (D @ mean) + T.mT @ difference)))
    z = mean - S @ m
    # 3. In the others any m would do: take the one that makes z shortest.
    lost = ~known.all(1)
    free = S[lost] @ (vectors[lost] * ~known[lost][:, None])
    z[lost] -= free @ (torch.linalg.pinv(free.mT @ free, hermitian=True) @ (free.mT @ z[lost]))
    return z[..., 0]


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
    """Replace the images of `f` and `r` by the head's inputs `(n, d)` for the n images of `train`, of which
    none is copied: they may be in a file."""
    place = torch.zeros(int(train.rows.max()) + 1, dtype=torch.int64)
    place[train.rows] = torch.arange(len(train))

    def part(images: ImageSet) -> FeatureSet:
        return FeatureSet(inputs, images.labels, place[images.rows], images.image_size)

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
