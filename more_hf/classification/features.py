"""The features that a classifier's head reads, collected in one pass; each sample once in all processes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, prepare_data_loader
from accelerate.utils import extract_model_from_parallel, reduce, send_to_device, tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from ..core.errors import PrototypeError, SiteNotFoundError, shown
from ..core.interrupts import unwound
from ..core.prototypes import PrototypeFitter, Prototypes, is_integer
from ..core.registry import find_erasure, locked
from ..core.views import routing_off
from .erasure import ClassErasure
from .heads import Inputs, evaluating, find_heads, find_module, is_of_tokens, nearest_tokens, pick, run
from .hook import channel_dim
from .names import class_names
from .resumed import SavedPass


DELAY = 2  # seconds after which a progress bar shows
IMAGES = "pixel_values"


def collect_prototypes(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | Sequence[str] | None = None,
    at: str | None = None,
    second_moment: bool = True,
    resume: str | os.PathLike | None = None,
) -> Prototypes:
    """
    Compute the mean feature of every class: one pass over the data in eval mode, O(dk) memory.

    The features are the original model's, even where classes have been erased from it. Under `accelerate
    launch` a `DataLoader` is sharded over the processes, every sample is counted once, and all processes get
    the same result. The model is unchanged: training flags and BatchNorm statistics are what they were.

    Args:
        model (`nn.Module`):
            A Transformers or timm classifier, or your own with `head` named; DDP and compiled ones too.
        loader (`Iterable`):
            Of `(images, labels)`, or of mappings with `labels` (or `label`) and what the model's processor or
            tokenizer gives (`pixel_values`, `input_values`, `input_ids` with `attention_mask`, ...): tensors,
            arrays or lists of numbers, labels `(batch,)` of any integer dtype, negative ones left out. What
            the model's `forward` does not name is not passed to it. A `DataLoader`, or any iterable of
            batches, which every process reads whole. An empty batch is passed over.
        head (`str` or `Sequence[str]`, *optional*):
            Name of the head where it cannot be found by running the model.
        at (`str`, *optional*):
            Take the input of this module instead; its mean over tokens or positions.
        second_moment (`bool`, *optional*, defaults to `True`):
            Also collect what `solver="covariance"` needs, with O(d²) more memory.
        resume (`str` or `os.PathLike`, *optional*):
            A file for the sums, written every half minute and at the end. A pass that was killed goes on from
            there, and one that had ended reads a single batch. Needs a `DataLoader` that does not shuffle, in
            one process.

    Returns:
        `Prototypes`: `(d, k)` float64, named by `class_names`. With several heads a feature is their inputs,
        concatenated.

    Raises:
        `PrototypeError`: the data has no labels or too few, a label has no output of the head, a class has no
        sample, or images or features are not finite. `SiteNotFoundError`: the head cannot be found. And what
        the model itself raises for images that it does not take.

    Source: MoRE, Algorithm 1, step 1; the released code of ESC collects in train mode, which overwrites
    BatchNorm statistics.

    Example:

        >>> import torch, more_hf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> images = torch.tensor([[1.0, 0, 0, 0], [3, 0, 0, 0], [0, 1, 0, 0]]).reshape(3, 1, 2, 2)
        >>> more_hf.collect_prototypes(model, [(images, torch.tensor([0, 0, 1]))])["0"]
        tensor([2., 0., 0., 0.], dtype=torch.float64)
    """
    with locked(plain_model(model)):  # while another thread erases, the features would be of neither model
        return collect(model, loader, head=head, at=at, second_moment=second_moment, resume=resume)[1]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | Sequence[str] | None,
    at: str | None,
    second_moment: bool,
    resume: str | os.PathLike | None = None,
    on_heads: Callable[[dict[str, nn.Module]], None] = lambda heads: None,
) -> tuple[dict[str, nn.Module], Prototypes]:
    """The heads, and what `collect_prototypes` returns. `on_heads` gets the heads first and may raise."""
    model = plain_model(model)
    current = find_erasure(model)
    with (
        _every_sample_once(loader) as (batches, sharded),
        nullcontext() if current is None else routing_off(current),
    ):
        # 1. The first batch shows where the heads are, and so which classes there are.
        inputs = inputs_of(model, with_bar(batches, "Collecting features"))
        first = next(inputs, None)
        if first is None:
            raise PrototypeError("The data has no sample. Prototypes need at least one of every class.")
        _refuse_other_problems(model)
        heads = _heads(model, first[0], head)
        on_heads(heads)
        names = class_names(model, len(next(iter(heads.values())).weight))

        # 2. One pass over all batches. Totals stay on the GPU; other accelerators may have no float64.
        with _reading(model, heads if at is None else {at: find_module(model, at)}) as read:
            found = read(*first)
            fitter = PrototypeFitter(
                found[0].shape[1], names, device=found[0].device if found[0].is_cuda else "cpu"
            )
            saved = None
            if resume is not None:
                about = {"names": list(names), "at": at, "second_moment": second_moment}
                saved = SavedPass.of(resume, loader, heads, about)
                saved.restore(fitter)
            if saved is None or not saved.done:
                pairs = chain([found], (read(*batch) for batch in inputs))
            else:
                later = with_bar(skip_first_batches(loader, saved.done), "Collecting the other features")
                pairs = (read(*batch) for batch in inputs_of(model, later))
            for features, labels in pairs:
                fitter.update(features, labels)
                if second_moment:
                    fitter.update_moment(features[labels >= 0])
                if saved is not None:
                    saved.add_batch(fitter)
            if saved is not None:
                saved.write(fitter)

    # 3. The totals of all processes.
    if sharded:
        fitter.totals = reduce(send_to_device(fitter.totals, PartialState().device), "sum")
    return heads, fitter.prototypes


def with_bar(batches: Iterable[Any], doing: str) -> Iterable[Any]:
    """The batches, with a progress bar where it takes long."""
    shown = transformers_logging.is_progress_bar_enabled()
    return tqdm(batches, desc=doing, unit="batch", delay=DELAY, disable=not shown)


def features_of(
    model: nn.Module, loader: Iterable[Any], *, head: str | Sequence[str] | None = None, at: str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """
    Yield features `(batch, d)` as the model has them now, after the edit if there is one, and labels
    `(batch,)`.

    Arguments, and what may be raised, as in `collect_prototypes`. Under `accelerate launch`, this process's
    part of a `DataLoader`.

    Example:

        >>> import torch
        >>> from more_hf.classification.features import features_of
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> [(z, y)] = features_of(model, [(torch.ones(3, 1, 2, 2), torch.tensor([0, 0, 1]))])
        >>> z.shape
        torch.Size([3, 4])
    """
    model = plain_model(model)
    with _every_sample_once(loader) as (batches, _):
        modules: dict[str, nn.Module] = {}
        for samples, labels in inputs_of(model, batches):
            if not modules:
                modules = _heads(model, samples, head) if at is None else {at: find_module(model, at)}
            # for one batch: what the caller does between batches finds the model in its own mode
            with _reading(model, modules) as read:
                features, labels = read(samples, labels)
            yield features, labels


def plain_model(model: nn.Module) -> nn.Module:
    """
    The classifier inside DDP, FSDP or `torch.compile`.

    Raises:
        `SiteNotFoundError`: it is no module, or the denoiser of an erased pipeline.
    """
    if not isinstance(model, nn.Module):
        raise SiteNotFoundError(
            f"A {type(model).__name__} is not a classifier. Pass the model itself, an nn.Module."
        )
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(find_erasure(plain), ClassErasure | None):
        raise SiteNotFoundError(
            f"This {type(plain).__name__} is the denoiser of an erased pipeline. Pass the pipeline."
        )
    return plain


def _refuse_other_problems(model: nn.Module) -> None:
    """Raises `SiteNotFoundError` for a model that does not give each sample one class."""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if problem not in (None, "single_label_classification"):
        raise SiteNotFoundError(
            f"The configuration of this {type(model).__name__} says {problem!r}, and only where each sample "
            "has one class can that be sent to another. Set `model.config.problem_type = "
            '"single_label_classification"` if it has.'
        )


def _heads(model: nn.Module, inputs: Inputs, head: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """The named heads, else those that were edited, else those that a run on two samples shows."""
    if hasattr(model, "get_text_features") or hasattr(model, "encode_text"):
        raise SiteNotFoundError(
            f"A {type(model).__name__} has no head, as its classes are prompts. Make it a classifier first: "
            "`more_hf.zero_shot_classifier(model, processor, names)`."
        )
    current = find_erasure(model)
    if head is None and current is not None:
        head = current.request.head
    two = {name: value[:2] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    return find_heads(model, two, head)


@contextmanager
def _reading(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterator[Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]]:
    """
    Yield the function that runs the model on samples and returns their features, and their labels on the same
    device.

    Hooks and eval mode are set once for all batches: a walk over all modules for each batch costs a small
    model several percent.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Any] = {}

    def record(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim < 2:
            raise SiteNotFoundError(
                f"`{name}` ({type(module).__name__}) is not called with a tensor of features as its first "
                "argument. Name another module."
            )
        z = args[0].movedim(channel_dim(module, args[0]), -1).float()
        inputs[name] = z.reshape(len(z), -1, z.shape[-1])
        outputs[name] = output

    def feature(name: str, logits: Tensor) -> Tensor:
        """One row a sample: the token that the logits come from, else the mean over positions."""
        z, output = inputs[name], outputs[name]
        if is_of_tokens(output, logits):
            return pick(z, nearest_tokens(output, logits))
        return z.mean(1)

    def read(samples: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:
        inputs.clear()
        logits = run(model, samples)
        if missing := [name for name in modules if name not in inputs]:
            raise SiteNotFoundError(
                f"The model does not call `{missing[0]}` in its forward pass, so it has no features there. "
                "Name another module."
            )
        features = torch.cat([feature(name, logits) for name in modules], dim=1)
        return features, labels.to(features.device)

    with unwound() as hooks, evaluating(model):
        for name, module in modules.items():
            # a forward hook is given what the edit's pre-hook made
            hooks.callback(module.register_forward_hook(partial(record, name)).remove)
        yield read


def inputs_of(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[Inputs, Tensor]]:
    """Every batch that is not empty: samples on the model's device in its dtype, and their labels, int64."""
    like = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    named = set(inspect.signature(model.forward).parameters)
    for batch in _to_the_end(batches):
        samples, labels = _as_tensors(batch, named)
        first = next(iter(samples.values()))
        if not is_integer(labels) or first.ndim < 2 or labels.shape != first.shape[:1]:
            raise PrototypeError(
                f"Labels must be one class number per sample, got {tuple(labels.shape)} {labels.dtype} for "
                f"samples {tuple(first.shape)}. For soft or one-hot labels pass `labels.argmax(1)`."
            )
        for name, value in samples.items():
            if not value.isfinite().all():
                raise PrototypeError(f"Some `{name}` are NaN or infinite. Leave these samples out.")
            cast = value.to(like.dtype) if value.is_floating_point() or name == IMAGES else value
            # under offload accelerate's hooks move the samples
            samples[name] = cast if like.is_meta else cast.to(like.device)
        if len(first):
            # images alone are passed by place, for models of one's own
            yield samples[IMAGES] if set(samples) == {IMAGES} else samples, labels.long()


def _to_the_end(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises `PrototypeError` if a generator of the user's stops in the middle of one."""
    try:
        yield from batches
    except RuntimeError as error:
        # what Python makes of a `StopIteration` inside a generator
        if not isinstance(error.__cause__, StopIteration):
            raise
        raise PrototypeError(
            "The data stops in the middle of a batch: its generator calls `next` on what is at its end, such "
            "as labels that are fewer than the samples. Pass a label for every sample."
        ) from error


def _as_tensors(batch: Any, named: set[str]) -> tuple[dict[str, Tensor], Tensor]:
    """A batch's samples by name and its labels. Raises `PrototypeError` if it has none."""
    samples: dict[str, Any] = {}
    labels = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
        samples = {name: batch[name] for name in batch if name in named and name not in ("labels", "label")}
        if not samples and (images := batch.get(IMAGES, batch.get("image"))) is not None:
            samples = {IMAGES: images}
    elif isinstance(batch, Sequence) and len(batch) == 2:
        images, labels = batch
        samples = {IMAGES: images}
    if not samples or any(value is None for value in (labels, *samples.values())):
        found = f"a mapping with {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise PrototypeError(
            f"The data has no labels, or nothing that the model reads: a batch is {found}. Pass (images, "
            "labels), or a mapping with what the model's processor gives and `labels`."
        )
    return {name: _as_tensor(name, value) for name, value in samples.items()}, _as_tensor("labels", labels)


def _as_tensor(name: str, value: Any) -> Tensor:
    """The values of a batch. Raises `PrototypeError` for texts, pictures and what else has no numbers."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PrototypeError(
            f"`{name}` of a batch holds no numbers: {shown(value)}. Pass what the model's processor gives, "
            "and of each sample the class's number."
        ) from error


@contextmanager
def _every_sample_once(loader: Iterable[Any]) -> Iterator[tuple[Iterable[Any], bool]]:
    """
    Yield this process's batches, and whether the other processes have others.

    An uneven end is not filled up with the first samples.
    """
    if PartialState().num_processes == 1 or not isinstance(loader, DataLoader):
        yield loader, False
        return
    if not isinstance(loader, DataLoaderShard):
        # Shuffled from one seed in every process, without an `Accelerator`, which would fix the user's mixed
        # precision.
        loader = prepare_data_loader(loader, use_seedable_sampler=True, data_seed=0, dispatch_batches=False)
    shard = loader.batch_sampler
    if not isinstance(shard, BatchSamplerShard):
        raise PrototypeError(
            "An iterable dataset cannot be sharded without counting samples twice. Use a dataset with a "
            "length, or collect the prototypes in one process."
        )
    with unwound() as changes:
        changes.callback(setattr, shard, "even_batches", shard.even_batches)
        shard.even_batches = False
        yield loader, True
