"""`erase_classes` and what belongs to it: the fit, the head's merge and hook, restore."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..core import erasure as store
from ..core.erasure import Site
from ..core.errors import MoreError, PrototypeError
from ..core.hook import detach_hook
from ..core.prototypes import Prototypes
from ..saving.record import refuse_erased_source
from .erasure import ClassErasure
from .features import collect, plain_model
from .heads import example_pixels, find_heads, find_module
from .hook import attach_hooks
from .labels import class_names, find_class
from .plan import check_request, make_request, solve
from .proof import prover


logger = logging.getLogger(__name__)


def erase_classes(
    model: nn.Module,
    data: Iterable[Any] | Prototypes,
    forget: str | int | Sequence[str | int],
    *,
    remap_to: str | int | Sequence[str | int] | None = "remain",
    num_experts: int | None = None,
    router: str | None = None,
    solver: str = "auto",
    seed: int = 0,
    head: str | Sequence[str] | None = None,
    at: str | None = None,
    keep_originals: bool = True,
) -> nn.Module:
    """Make an image classifier forget classes, in place, and return it: in closed form, in one pass over the data, without training.

    The feature that the head reads goes through a remapping expert first, by a forward pre-hook, and the mean expert is merged into
    the head's weight as well; the state dict's keys and shapes stay as they are. So `save_pretrained` and `from_pretrained` give a
    model whose predictions forget. **Its features are the original's**: the backbone is untouched, and the feature forgets only while
    the hook is there (`more_hf.save(..., include_delta=True)` and `more_hf.load` put it back). On a model that was erased before,
    all its classes are fitted again jointly, from the kept originals and the new data.

    Args:
        model (`nn.Module`): a Transformers or timm image classifier, or your own with `head` named, in fp16, bf16, fp32 or fp64. A
            model inside DDP or `torch.compile` is edited inside. With two heads (DeiT with its teacher's token) both are edited.
        data (`Iterable` or `Prototypes`): batches as in `collect_prototypes`, of every class, or what it returned.
        forget (`str`, `int` or a sequence of them): classes by name (a synonym of an ImageNet label will do) or number.
        remap_to (defaults to `"remain"`): what they become: every other class is a candidate (Algorithm 1, step 3), or these classes
            are, or `None` erases only: the feature then holds nothing of the class, but sits apart from all others, where a new
            probe still finds it.
        num_experts (`int`, *optional*): how many experts draw targets, without replacement until all are used, then again. By default as
            many as use each target equally; but one for `"remain"` without a router, the paper's Remap.
        router (`str`, *optional*): which expert a sample takes: `"random"` (MoRE, redrawn at every call: asking twice undoes it), `"hash"`
            (a function of the sample), `"prototype"` (MoRE-P), `"prototype_random"` (MoRE-R). By default the mean expert: with
            several targets it sends a class to their centroid, a cluster of its own, which a new probe can tell from every target.
        solver (`str`, defaults to `"auto"`): `"pinv"` (the paper: every other prototype stays exactly), `"covariance"` (the targets stay
            exactly, the others move least), or `pinv` unless there are more classes than features or P is ill-conditioned.
        seed (`int`, defaults to 0): of the draw of targets. No global random state is touched.
        head (`str` or `Sequence[str]`, *optional*): name of the head where running the model does not find it.
        at (`str`, *optional*): edit the input of this inner module instead, a block for instance. A hook only: such a model is **not
            erased at rest**, whatever saves it saves the original.
        keep_originals (`bool`, defaults to `True`): keep the head's original weight in CPU memory for `restore`.

    Raises:
        `PrototypeError`: a class is unknown, has no sample, or is on both sides; the data has no labels; no exact edit exists.
        `TargetNotFoundError`: the head cannot be found, or cannot be edited as it is. `AlreadyErasedError`: the model was erased and
        its originals are not here. The model is unchanged then.

    Source: MoRE, Eq. 4 to 6 and Algorithms 1, 2 and 4; the covariance metric and the hash router are ours.

    Example:

        >>> import torch, more_hf
        >>> images, labels = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> model = more_hf.erase_classes(model, [(images, labels)], forget=[0], remap_to=[1])
        >>> more_hf.get_erasure(model).facts["sent_to"]
        {'0': ['1']}
    """
    plain = plain_model(model)
    current = store.require_editable(plain)
    head = head or (current and current.request["head"])
    request: dict[str, Any] = {}

    def look(heads: Mapping[str, nn.Module]) -> None:
        """Every check that needs no feature, as soon as the number of classes is known."""
        sites = {name: Site(name, module) for name, module in heads.items()}
        store.check_unshared(sites, plain)
        if current is None:
            refuse_erased_source(getattr(getattr(plain, "config", None), "_name_or_path", None), lambda record: sites)
        names = class_names(plain, next(iter(heads.values())).out_features)
        wanted = make_request(names, forget, remap_to, num_experts, router, solver, seed, list(heads), at)
        request.update(wanted if current is None else joined(current.request, wanted))
        check_request(names, request)

    if isinstance(data, Prototypes):
        heads, prototypes = find_heads(plain, None if head else example_pixels(plain), head), data
        look(heads)
    else:
        heads, prototypes = collect(plain, data, head=head, at=at, second_moment=solver != "pinv", look=look)
    _fit(plain, heads, prototypes, request, keep_originals)
    return model


def joined(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One request for what was erased and what is to be. Raises `MoreError` if they are at different places of the model."""
    if (old["head"], old["at"]) != (new["head"], new["at"]):
        raise MoreError(
            f"Classes were erased at {old['at'] or old['head']} and cannot be fitted jointly with others at {new['at'] or new['head']}. "
            "Call `more_hf.restore` first, and forget all classes at once."
        )
    return {**new, **{key: {**old[key], **new[key]} for key in ("concepts", "remap_to")}}


def restore(model: nn.Module, classes: str | int | Sequence[str | int] | None = None) -> nn.Module:
    """`more_hf.restore` for classifiers."""
    plain = plain_model(model)
    erasure = store.require_editable(plain)
    if erasure is None:
        raise MoreError(f"Nothing was erased from this {type(plain).__name__}, so there is nothing to restore.")
    names = class_names(plain, erasure.num_classes)
    wanted = erasure.concepts if classes is None else [classes] if isinstance(classes, str | int) else list(classes)
    wanted = [find_class(names, name) for name in wanted]
    if unknown := [name for name in wanted if name not in erasure.concepts]:
        raise MoreError(f"{', '.join(map(repr, unknown))} was not erased here. Erased: {', '.join(map(repr, erasure.concepts))}.")
    kept = [name for name in erasure.concepts if name not in wanted]
    if kept:
        part = {key: {name: erasure.request[key][name] for name in kept} for key in ("concepts", "remap_to")}
        heads = find_heads(plain, None, erasure.request["head"])
        _fit(plain, heads, erasure.prototypes, {**erasure.request, **part}, keep_originals=True)
        return model
    store.forget(plain)
    detach_hook(erasure)
    return model


def get_erasure(model: nn.Module) -> ClassErasure | None:
    """`more_hf.get_erasure` for classifiers."""
    return store.find_erasure(plain_model(model))


def _fit(model: nn.Module, heads: Mapping[str, nn.Linear], prototypes: Prototypes, request: dict[str, Any], keep_originals: bool) -> None:
    """Dual, merge, hook, proof: all of it, or the model is what it was."""
    current = store.find_erasure(model)
    at = request["at"]
    modules = heads if at is None else {at: find_module(model, at)}
    widths = [head.in_features for head in heads.values()] if at is None else [len(prototypes.matrix)]
    if sum(widths) != len(prototypes.matrix):
        raise PrototypeError(
            f"The prototypes have {len(prototypes.matrix)} features, and the head reads {sum(widths)}. Collect them from this model."
        )
    solution, facts = solve(prototypes, widths, request)
    remaps = dict(zip(modules, solution, strict=True))
    sites = {name: Site(name, head, space=name) for name, head in heads.items()} if at is None else {}
    originals = current.originals if current else {name: site.read().to("cpu", copy=True) for name, site in sites.items()}
    measured = [remap.verify() for remap in solution]
    erasure = ClassErasure(
        request=request,
        remap=solution[0],
        remaps=remaps,
        sites=sites,
        originals=originals,
        guarantees={key: (min if key == "rank" else max)(one[key] for one in measured) for key in measured[0]},
        proof={},
        facts={
            **facts,
            "base": current.facts["base"] if current else str(getattr(getattr(model, "config", None), "_name_or_path", "")),
            "model": type(model).__name__,
            "num_classes": next(iter(heads.values())).out_features,
            "fingerprint": current.facts["fingerprint"] if current else store.fingerprint(originals),
            "spaces": {name: name for name in sites},  # each head reads its own features
            "separation": {name: float((originals[name].double() @ remaps[name].shift()).norm()) for name in sites},
        },
        prototypes=prototypes,
    )
    prove = prover(model, modules, erasure, current)
    if current is not None:
        detach_hook(current)
    attach_hooks(model, modules, erasure)
    try:
        store.apply(model, erasure, prove, keep_originals=keep_originals)
    except BaseException:
        detach_hook(erasure)
        if current is not None:
            attach_hooks(model, modules, current)
        raise
    if at is not None:
        logger.warning("The classes are forgotten by a hook on `%s` only, not at rest: whatever saves this model saves the original.", at)
