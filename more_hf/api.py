"""The verbs that work on everything erased, and the one place that tells pipelines from classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from .core.erasure import Erasure
from .core.errors import MoreError
from .core.interrupts import afterwards, unwound
from .core.registry import locked
from .core.request import read_seeds
from .core.views import original_shown


def kind_of(model: Any, module: str = "erase") -> ModuleType:
    """The module of this name for this kind of model: `erase`, with `restore` and the like, or `compare`."""
    place = ".classification" if isinstance(model, nn.Module) else ".diffusion"
    return import_module(f"{place}.{module}", __package__)


def restore(model: Any, concepts: str | int | Sequence[str | int] | None = None) -> Any:
    """
    Undo an erasure in place: all of it bit for bit, or some concepts or classes (the others are fitted
    again).

    An interruption at any point leaves the erased model or the restored one. A second thread that erases or
    restores the same model meanwhile waits.

    Args:
        model (`DiffusionPipeline` or `nn.Module`):
            The erased pipeline or classifier.
        concepts (`str`, `int` or a sequence of them, *optional*):
            What to give back; everything by default.

    Returns:
        The same pipeline or classifier.

    Raises:
        `MoreError`: nothing was erased, or a concept was not. `AlreadyErasedError`: the originals are not
        here. `IncompatibleBaseError`: the edited layers were changed since (a LoRA fused, training).
        `SiteNotFoundError`: they are no longer what the model reads (fused projections).
    """
    return kind_of(model).restore(model, concepts)


def get_erasure(model: Any) -> Erasure | None:
    """
    What was erased from a pipeline or classifier and how, or `None`. The object is the live record; do not
    change it.

    It knows what was done in this process, or opened by `more_hf.load`. Plain `from_pretrained` reads no
    record and gives `None` for an erased model, too; to erase from it again is refused where the record lies
    in the folder that it was opened from.
    """
    return kind_of(model).get_erasure(model)


def compare(model: Any, data: str | Iterable[Any], *, original: Any = None, **kwargs: Any) -> Any:
    """
    Compare an erased pipeline or classifier with its original: a picture, or every class's accuracy.

    The rows of a pipeline's picture are `before`, `after` and, for prompts with a forgotten name that has one
    target, `target`: the same prompt with the target in place of the name, drawn by the original. A column is
    a prompt, and every picture in it is drawn from the same noise.

    Args:
        model (`DiffusionPipeline` or `nn.Module`):
            The erased pipeline or classifier.
        data (`str`, `Sequence[str]` or `Iterable`):
            For a pipeline one or several prompts; for a classifier batches as in `collect_prototypes`.
        original (`DiffusionPipeline` or `nn.Module`, *optional*):
            The model before the erasure, where its original weights are not here: they were not kept, or it
            was opened by `more_hf.load`. Without it, such a model is shown as it is now, and the result says
            so.
        kwargs:
            For a pipeline: `seed` (`int`, defaults to 0) of the first column, counted up to the right, and
            arguments of the pipeline's own call (`num_inference_steps`, `height`, ...), whose defaults hold
            otherwise.

    Returns:
        `PIL.Image.Image` for a pipeline, [`~more_hf.classification.accuracies.Accuracies`] for a classifier,
        with a table, a picture (`to_picture`) and what each class's samples became. A notebook shows both.

    Raises:
        `MoreError`: nothing was erased and there is no `original`, or no prompt. `PrototypeError`: data
        without labels.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> prompts = ["a cat face in the style of Blobmoji", "a cat face in the style of Noto"]
        >>> image = more_hf.compare(pipe, prompts, num_inference_steps=10, guidance_scale=4.0)
    """
    if original is None and get_erasure(model) is None:
        raise MoreError(
            f"Nothing was erased from this {type(model).__name__}, so there is nothing to compare. If it was "
            "opened with `from_pretrained`, which reads no record, open it with `more_hf.load` or pass "
            "`original=`."
        )
    room = kind_of(model, "compare")
    show_original = partial(_show_original, model, original)
    return room.compare(model, data, show_original=show_original, seeded=_seeded, **kwargs)


@contextmanager
def _show_original(model: Any, original: Any) -> Iterator[Any]:
    """What answers as the original inside the block: another model, or this one; `None` if neither can."""
    if original is not None:
        yield original
    elif get_erasure(model).originals is None:
        yield None
    else:
        with disabled(model):
            yield model


def _seeded(model: Any, seeds: Sequence[int]) -> AbstractContextManager[Any]:
    """`routing` for a model that has a router; any other does not need it."""
    return nullcontext(model) if _router_of(model) is None else routing(model, seeds)


def _router_of(model: Any) -> Any:
    """The router on a model; `None` also where it was loaded without the factors."""
    erasure = get_erasure(model)
    return None if erasure is None or erasure.hook is None else erasure.hook.router


@contextmanager
def disabled(model: Any) -> Iterator[Any]:
    """
    Show the original inside the `with` block, to the calling context only.

    The weights stay the erased ones: the original's output is computed beside them. A save, another thread or
    a crash inside the block meets the erased model. Compiled models run eagerly meanwhile.

    Args:
        model (`DiffusionPipeline` or `nn.Module`):
            An erased pipeline or classifier whose originals were kept.

    Raises:
        `MoreError`: nothing was erased. `AlreadyErasedError`: the originals are not here.
        `SiteNotFoundError`: the model no longer reads through the edited layers (fused projections), before
        the block or after it.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> with more_hf.disabled(pipe):
        ...     before = pipe("a cat face in the style of Blobmoji", num_inference_steps=10).images[0]
    """
    kind = kind_of(model)
    with unwound() as stack:
        # while another thread erases or restores, what is the original is about to change
        with locked(kind.edited_module(model)):
            erasure = get_erasure(model)
            if erasure is None:
                raise MoreError(
                    f"Nothing was erased from this {type(model).__name__}, so there is nothing to disable. "
                    "Erase first, or call the model as it is."
                )
            kind.check_in_place(model)
            stack.enter_context(original_shown(erasure))
        yield model
    kind.check_in_place(model)


@contextmanager
def routing(model: Any, seeds: Sequence[int]) -> Iterator[Any]:
    """
    Give every sample of the calls inside its own stream of experts: expert = function of its seed and the
    call's index.

    What comes out then does not depend on batch size or process. Outside such a block no one's random numbers
    are touched.

    Args:
        model (`DiffusionPipeline` or `nn.Module`):
            An erased pipeline or classifier with a router.
        seeds (`Sequence[int]`):
            One integer per image of the batch; the halves of classifier-free guidance share them.

    Raises:
        `MoreError`: there is no router. `PrototypeError`: there is no seed, or one is no whole number.
    """
    router = _router_of(model)
    if router is None:
        raise MoreError(
            f'This {type(model).__name__} has no router. Erase with router="random" or router="hash" first.'
        )
    seeds = read_seeds(seeds)
    with afterwards(partial(router.reset, None)):
        router.reset(seeds)
        yield model
