"""`erase_classes` and `forget_samples` under the names of the tables."""

from __future__ import annotations

from functools import partial

from torch import nn

from ...classification.erase import erase_classes
from ...classification.random_data import forget_samples
from .training import read


def more(
    model: nn.Module,
    splits,
    *,
    seed: int = 0,
    remap_to: str | int | list[int] | None = "remain",
    num_experts: int | None = None,
    router: str | None = "random",
    solver: str = "auto",
    batch_size: int = 500,
) -> nn.Module:
    """MoRE: every forgotten class goes to several remaining ones. All settings as in `more_hf.erase_classes`."""
    batches = (batch for part in (splits.f, splits.r) for batch in read(part.loader(batch_size), model))
    forget = splits.f.labels.unique().tolist()
    settings = {"remap_to": remap_to, "num_experts": num_experts, "router": router, "solver": solver, "seed": seed}
    return erase_classes(model, batches, forget, **settings).eval()


more_hash = partial(more, router="hash")
more_prototype = partial(more, router="prototype")
remap = partial(more, router=None)
erase = partial(more, router=None, remap_to=None)


def remap_samples(model: nn.Module, splits, *, seed: int = 0, as_printed: bool = False, batch_size: int = 500) -> nn.Module:
    """Ours for single samples instead of classes (Algorithm 3); settings as in `forget_samples`."""
    forget, remain = (read(part.loader(batch_size), model) for part in (splits.f, splits.r))
    forget_samples(model, forget, remain, as_printed=as_printed)
    return model.eval()


remap_samples_as_printed = partial(remap_samples, as_printed=True)
