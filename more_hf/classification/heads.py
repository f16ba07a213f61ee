"""Where a classifier's logits come from: its head, found by running the model once, not by a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import SiteNotFoundError
from ..core.interrupts import afterwards, unwound
from ..core.request import read_names
from ..core.site import is_linear
from ..core.views import running_eagerly


# What a model is called with: a tensor of images, or its processor's tensors by the names of its arguments.
Inputs = Tensor | dict[str, Tensor]


def find_heads(
    model: nn.Module, inputs: Inputs, head: str | Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """
    Find the linear layers that give the logits, by name, in the order in which the model calls them.

    The rule: run the model once on `inputs` and look at the output of every `nn.Linear` and every 1×1
    `nn.Conv2d`, of a map its mean over positions, of a row of tokens the token nearest to the logits (a
    language model classifies by its last token). The head is the one layer whose output is the logits;
    several heads are all the layers of the logits' shape whose mean is the logits (DeiT with its teacher's
    token).

    Args:
        model (`nn.Module`):
            A classifier that returns logits `(batch, num_classes)`, as a tensor or as `.logits`.
        inputs (`Tensor` or `dict[str, Tensor]`):
            Any samples that the model takes: images `(batch, channels, height, width)`, or what its processor
            or tokenizer gives, by name.
        head (`str` or `Sequence[str]`, *optional*):
            The name or names, where the rule does not apply. Nothing is run then.

    Raises:
        `SiteNotFoundError`: there is no such layer, or the rule finds none. The message names the candidates.

    Example:

        >>> import torch
        >>> from more_hf.classification.heads import find_heads
        >>> layers = torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> find_heads(model, torch.rand(1, 3, 2, 2))
        {'3': Linear(in_features=5, out_features=2, bias=True)}
    """
    if head is not None:
        return _named_heads(model, read_names("head", head))

    # 1. The output of every linear layer in one run.
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    outputs: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):  # a router of experts gives more than one
            outputs[name] = output.mean((2, 3)) if isinstance(module, nn.Conv2d) else output

    with unwound() as hooks, evaluating(model):
        for name, module in linear.items():
            hooks.callback(module.register_forward_hook(partial(record, name)).remove)
        logits = run(model, inputs)
    if not logits.isfinite().all():
        raise SiteNotFoundError(
            f"The logits of this {type(model).__name__} are NaN or infinite, so its head cannot be known by "
            "them. Check its weights, or run it in a wider dtype."
        )

    # 2. The one that is the logits, or those whose mean is.
    shaped = {name: output for name, output in outputs.items() if output.shape == logits.shape}
    equal = [name for name, output in shaped.items() if _same(output, logits)]
    of_tokens = [name for name, output in outputs.items() if is_of_tokens(output, logits)]
    for name in of_tokens:
        if _same(pick(outputs[name], nearest_tokens(outputs[name], logits)), logits):
            equal.append(name)
    if not equal and len(shaped) > 1 and _same(torch.stack([*shaped.values()]).mean(0), logits):
        equal = list(shaped)
    elif len(equal) != 1:
        raise SiteNotFoundError(
            f"No head found in {type(model).__name__}: of its {len(linear)} linear layers, {len(equal)} give "
            f"exactly its logits {tuple(logits.shape)}, alone or as a mean. Of that shape are the outputs of "
            f"{', '.join(map(repr, shaped)) or 'none'}. Pass the name of the one that makes the logits as "
            "`head`."
        )
    return {name: linear[name] for name in equal}


def _named_heads(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The layers of these names. Raises `SiteNotFoundError` for none, or for what is not linear."""
    if not names:
        raise SiteNotFoundError("`head` is empty. Name the layer that makes the logits, or leave it out.")
    named = {name: find_module(model, name) for name in names}
    for name, module in named.items():
        if not is_linear(module):
            raise SiteNotFoundError(
                f"`{name}` ({type(module).__name__}) is not a linear layer. Name the nn.Linear or "
                "1×1 nn.Conv2d that makes the logits."
            )
    sizes = {name: len(module.weight) for name, module in named.items()}
    if len(set(sizes.values())) > 1:
        raise SiteNotFoundError(
            f"The heads {sizes} do not have the same classes. Name those alone that have what is to be "
            "forgotten, and erase from others in another copy of the model."
        )
    return named


def find_module(model: nn.Module, name: str) -> nn.Module:
    """A module of the model by its name. Raises `SiteNotFoundError` if there is none."""
    modules = dict(model.named_modules())
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=5) or list(modules)[-5:]
        raise SiteNotFoundError(
            f"{type(model).__name__} has no module {name!r}. Choose another, such as "
            f"{', '.join(map(repr, close))}."
        )
    return modules[name]


def _same(output: Tensor, logits: Tensor) -> bool:
    """Equal up to the rounding of a cast or a mean in half precision."""
    return bool((output.float() - logits.float()).abs().max() <= 1e-3 * logits.float().abs().max())


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits `(batch, num_classes)`. Raises `SiteNotFoundError` for none."""
    return logits_of(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def is_of_tokens(output: Any, logits: Tensor) -> bool:
    """Whether a layer gives logits for every token: `(batch, tokens, num_classes)`."""
    return isinstance(output, Tensor) and output.ndim == 3 and output.shape[::2] == logits.shape


def nearest_tokens(outputs: Tensor, logits: Tensor) -> Tensor:
    """Of each sample the position `(batch,)` whose output `(batch, tokens, num_classes)` is its logits."""
    return (outputs - logits[:, None]).abs().amax(-1).argmin(1)


def pick(rows: Tensor, positions: Tensor) -> Tensor:
    """One position's row of each sample: `(batch, tokens, d)` becomes `(batch, d)`."""
    return rows[torch.arange(len(rows), device=rows.device), positions]


def logits_of(output: Any) -> Tensor:
    """The logits `(batch, num_classes)` in a classifier's output. Raises `SiteNotFoundError` for none."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise SiteNotFoundError(
            f"The model returned {what}, not logits (batch, num_classes), as a tensor or as `.logits`. Is it "
            "a classifier?"
        )
    return logits


def example_pixels(model: nn.Module) -> Tensor:
    """
    One image of fixed noise, `(1, channels, height, width)`, of the size in the model's configuration.

    Raises:
        `SiteNotFoundError`: the model has no configuration of Transformers or timm, or reads no images.
    """
    if (reads := getattr(model, "main_input_name", "pixel_values")) != "pixel_values":
        raise SiteNotFoundError(
            f"{type(model).__name__} reads `{reads}`, not images. Pass `head`, or data in place of "
            "prototypes."
        )
    inner = getattr(model, "timm_model", model)
    if hasattr(inner, "pretrained_cfg"):
        shape = inner.pretrained_cfg["input_size"]
    elif hasattr(model, "config"):
        size = getattr(model.config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (getattr(model.config, "num_channels", 3), height, width)
    else:
        raise SiteNotFoundError(
            f"{type(model).__name__} has no configuration that names its input size, so it cannot be run to "
            "find its head. Pass `head`, or data with images."
        )
    return torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """
    Inside the block: no gradients, no dropout, no update of BatchNorm, and nothing compiled, since hooks are
    put on.

    Training flags are what they were afterwards.
    """
    training = [module for module in model.modules() if module.training]

    def undo() -> None:
        for module in training:
            module.training = True

    with afterwards(undo), unwound() as modes:
        modes.enter_context(torch.no_grad())
        modes.enter_context(running_eagerly())
        model.eval()
        yield
