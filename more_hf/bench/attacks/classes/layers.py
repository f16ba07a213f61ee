"""Before the edit: heads on every block's output, on features without the hook, on features mapped back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ....classification.heads import evaluating
from ...classes.heads import linear_head
from ...splits import ImageSet
from ..result import Result
from .victim import Part, Seen, Victim


def layers(victim: Victim) -> Iterator[Result]:
    """Fit a linear head on the mean output of every block, and on what the head's hooks read."""
    labels = victim.labels("train")
    blocks = block_features(victim.seen, victim.parts)
    # Heads of all classes depend on the backbone alone, whatever is forgotten.
    for i, z in enumerate(blocks):
        logits = victim.seen.remember(f"layer {i}", lambda z=z: linear_head(z["train"], labels, z["test"]))
        yield from victim.scores(logits, variant="after a block", budget=i + 1, unit="blocks")
    z = victim.cached.inputs
    logits = victim.seen.remember("layer -1", lambda: linear_head(z["train"], labels, z["test"]))
    yield from victim.scores(logits, variant="without the hook")


def ridge(victim: Victim, *, asked: Sequence[int] = (1, 16), penalty: float = 1e-3) -> Iterator[Result]:
    """Map features back to the original's by ridge regression on remaining images, and ask its old head.

    It needs no forgotten image, but the original's features of the remaining ones.

    Args:
        asked (`Sequence[int]`): how many answers the features are means of.
        penalty (`float`, defaults to 1e-3): in units of the features' mean variance.
    """
    from sklearn.linear_model import Ridge

    kept, head = ~victim.forgotten("train"), victim.original.cached.head
    before = victim.original.cached.inputs["train"][kept].double()
    for count in asked:
        train, test = (victim.cached.features(part, passes=count).double() for part in ("train", "test"))
        alpha = penalty * float(train[kept].var(0).mean()) * int(kept.sum())
        mapped = Ridge(alpha).fit(train[kept].numpy(), before.numpy()).predict(test.numpy())
        features = torch.from_numpy(mapped).to(head.weight)
        logits = nn.functional.linear(features, head.weight, head.bias).detach().cpu()
        yield from victim.scores(logits, variant="ridge map", budget=count, unit="queries")


def block_features(seen: Seen, parts: Mapping[Part, ImageSet]) -> list[dict[Part, Tensor]]:
    """The mean over positions or tokens of every block's output, `(n, channels)` for each part.

    The blocks are the elements of the classifier's longest list of modules, those that have parameters.
    """
    return seen.remember("blocks", lambda: _block_features(seen.cached.model, parts))


def _block_features(model: nn.Module, parts: Mapping[Part, ImageSet]) -> list[dict[Part, Tensor]]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    blocks = [block for block in max(lists, key=len) if any(True for _ in block.parameters())]
    outputs: dict[int, list[Tensor]] = {i: [] for i in range(len(blocks))}

    def keep(i: int, output: Tensor) -> None:
        # (n, c, height, width) of a convolution, (n, tokens, c) of a transformer
        output = output.flatten(2) if output.ndim == 4 else output.mT
        outputs[i].append(output.mean(-1).float().cpu())

    with evaluating(model), ExitStack() as hooks:
        for i, block in enumerate(blocks):
            handle = block.register_forward_hook(lambda module, args, output, i=i: keep(i, output))
            hooks.callback(handle.remove)
        for images in parts.values():
            for batch in images.loader(100):
                model(batch["pixel_values"].to(next(model.parameters()).device))
    sizes = [len(images) for images in parts.values()]
    return [dict(zip(parts, torch.cat(outputs[i]).split(sizes), strict=True)) for i in outputs]
