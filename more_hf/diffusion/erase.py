"""`erase_concept` and what belongs to it: the request, the routing hook, the proof by run, restore, disabled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from .. import erasure as store
from ..erasure import Erasure
from ..errors import AlreadyErasedError, MoreError, TargetNotFoundError
from ..remap import Remap
from .concepts import Encoder, shared_first_tokens
from .hook import RoutingHook, attach_hook, detach_hook, hook_off
from .proof import prover
from .request import make_request, solve
from .sites import Denoiser, find_denoiser, find_sites, lora_branches


RECORD = "more_hf.json"  # written by `more_hf.save` beside an erased pipeline


def erase_concept(
    pipe: DiffusionPipeline,
    concepts: str | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    remap_to: str | Sequence[str] | None,
    retain: Sequence[str] | None = None,
    num_experts: int | None = None,
    router: str | None = None,
    solver: str = "auto",
    tokens: str = "positions",
    keep_originals: bool = True,
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase concepts from a pipeline, in place, and return it: in closed form, without training.

    Every layer of the denoiser that reads the prompt gets the mean expert merged into its weight; names, shapes and dtypes stay as
    they are, so that every tool which saves or copies the pipeline copies the erased one. On a pipeline that was erased before, all
    its concepts are fitted again jointly, from the kept originals.

    Args:
        pipe (`DiffusionPipeline`): a Stable Diffusion 1.x or 2.x pipeline, in fp16, bf16, fp32 or fp64, on any device.
        concepts (`str`, `Sequence[str]` or `Mapping[str, Sequence[str]]`): what to forget; a mapping gives each name's aliases.
        remap_to (`str`, `Sequence[str]` or `None`): what the concepts become. With several names, their mean, or one per expert with a
            router. `None` projects the concepts out and puts nothing in their place.
        retain (`Sequence[str]`, *optional*): names to protect. `pinv` keeps their prototypes exactly where they are, like the begin
            token's and the empty prompt's; `covariance` counts their prompts among the ordinary ones. The report says how far they move.
        num_experts (`int`, *optional*): how many experts draw their targets from `remap_to`; by default as many as use each equally.
        router (`str`, *optional*): `"random"` (the paper: one expert per call and sample) or `"hash"` (a function of the prompt); lives
            in this process only. By default the mean expert alone, so that what you see is what is saved.
        solver (`str`, defaults to `"auto"`): `"pinv"` (the paper), `"covariance"`, or whichever moves ordinary prompts less, measured
            at every call and reported.
        tokens (`str`, defaults to `"positions"`): which prompt positions make prototypes: `"positions"` (the name's last token, the
            tokens after it, the end token and the padding, one prototype each), `"subject"`, `"end"`, `"subject+end"`, `"last"`.
        keep_originals (`bool`, defaults to `True`): keep the edited layers' original weights in CPU memory for `restore`.
        seed (`int`, defaults to 0): of the draw of targets for experts. No global random state is touched.

    Raises:
        `PrototypeError`: a name is wrong, or no exact edit exists; `TargetNotFoundError`: the pipeline cannot be edited as it is;
        `AlreadyErasedError`: it was erased and its originals are not here. The pipeline is unchanged then.

    The defaults were measured on the embedded pipeline, four styles erased in turn, 136 pictures a setting: `"positions"` left 0 % of the
    pictures recognisable, every single kind of token 2 to 10 %; `"pinv"` moved other artists 2.7 times as far (LPIPS) as
    `"covariance"`; two or more targets left 2 to 8 % where one left none (`benchmarks/artists/defaults.csv`).

    Source: MoRE, Eq. 4 to 6 and Algorithm 1, on the cross-attention inputs; the covariance metric and token positions are ours.

    Example:

        >>> import more_hf
        >>> pipe = more_hf.load_emoji_sd()
        >>> pipe = more_hf.erase_concept(pipe, "Blobmoji", remap_to=["Fluent"])
        >>> image = pipe("a cat face in the style of Blobmoji", num_inference_steps=10).images[0]
    """
    request = make_request(concepts, remap_to, retain, num_experts, router, solver, tokens, seed)
    denoiser = find_denoiser(pipe)
    current = store.require_editable(denoiser.module)
    source = pipe.config.get("_name_or_path")
    if current is None and source and (Path(source) / RECORD).is_file():
        raise AlreadyErasedError(
            f"{source} was saved erased (it has a {RECORD}), and the original weights are not there. "
            "Start from the original model and pass all concepts at once."
        )
    if current is not None:
        old = current.request
        request["concepts"] = {**old["concepts"], **request["concepts"]}
        request["remap_to"] = {**old["remap_to"], **request["remap_to"]}
        request["retain"] = list(dict.fromkeys([*old["retain"], *request["retain"]]))
    return _fit(pipe, denoiser, request, keep_originals)


def restore(pipe: DiffusionPipeline, concepts: str | Sequence[str] | None = None) -> DiffusionPipeline:
    """Undo an erasure in place and return the pipeline: all of it bit for bit, or some concepts (the others are fitted again).

    Raises `MoreError` if nothing was erased or a concept was not, `AlreadyErasedError` without originals, and
    `IncompatibleBaseError` if the edited layers were changed since (a LoRA fused, training).
    """
    denoiser = find_denoiser(pipe)
    erasure = store.require_editable(denoiser.module)
    if erasure is None:
        raise MoreError("Nothing was erased from this pipeline, so there is nothing to restore.")
    names = erasure.concepts if concepts is None else [concepts] if isinstance(concepts, str) else list(concepts)
    if unknown := [name for name in names if name not in erasure.concepts]:
        raise MoreError(f"{', '.join(map(repr, unknown))} was not erased here. Erased: {', '.join(map(repr, erasure.concepts))}.")
    kept = [name for name in erasure.concepts if name not in names]
    if kept:
        part = {key: {name: erasure.request[key][name] for name in kept} for key in ("concepts", "remap_to")}
        return _fit(pipe, denoiser, {**erasure.request, **part}, keep_originals=True)
    store.forget(denoiser.module)
    detach_hook(erasure)
    return pipe


def get_erasure(pipe: DiffusionPipeline) -> Erasure | None:
    """What was erased from the pipeline and how, or `None`. The object is the live record; do not change it."""
    parts = (unwrap_module(part) for part in pipe.components.values() if isinstance(part, nn.Module))
    return next(filter(None, map(store.find_erasure, parts)), None)


@contextmanager
def disabled(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """The original pipeline inside the `with` block, the erased one again after it. Raises `MoreError` if nothing was erased."""
    erasure = get_erasure(pipe)
    if erasure is None:
        raise MoreError("Nothing was erased from this pipeline, so there is nothing to disable.")
    with hook_off(erasure), erasure.original_weights():
        yield pipe


@contextmanager
def routing(pipe: DiffusionPipeline, seeds: Sequence[int]) -> Iterator[DiffusionPipeline]:
    """Give every sample of the calls inside its own stream of experts: expert = function of its seed and the call's index.

    `seeds` has one integer per image of the batch; the halves of classifier-free guidance share them. The images then do not
    depend on batch size or process. Raises `MoreError` if the pipeline has no router.
    """
    erasure = get_erasure(pipe)
    if erasure is None or erasure.hook is None:
        raise MoreError('This pipeline has no router. Erase with router="random" or router="hash" first.')
    if not seeds:
        raise MoreError("`seeds` is empty. Pass one integer per image of the batch.")
    erasure.hook.router.reset(seeds)
    try:
        yield pipe
    finally:
        erasure.hook.router.reset(None)


def _fit(pipe: DiffusionPipeline, denoiser: Denoiser, request: dict[str, Any], keep_originals: bool) -> DiffusionPipeline:
    """Prototypes, dual, merge, hook, proof: all of it, or the pipeline is what it was."""
    current = store.find_erasure(denoiser.module)
    sites = find_sites(pipe, denoiser)
    remap, solution = solve(pipe, request)
    width = len(remap.prototypes.matrix)
    if wrong := [name for name, site in sites.items() if site.module.in_features != width]:
        raise TargetNotFoundError(f"`{wrong[0]}` does not read the text encoder's {width} features. Is this the right text encoder?")
    originals = current.originals if current else {name: site.read().to("cpu", copy=True) for name, site in sites.items()}
    erasure = Erasure(
        request=request,
        remap=remap,
        sites=sites,
        originals=originals,
        guarantees=remap.verify(),
        proof={},
        facts={
            **solution,
            "rank": remap.rank,
            "num_experts": remap.num_experts,
            "condition_number": remap.condition_number,
            "leaks": _leaks(pipe, request, remap, denoiser),
            "base": current.facts["base"] if current else str(pipe.config.get("_name_or_path") or ""),
            "pipeline": type(pipe).__name__,
            "fingerprint": current.facts["fingerprint"] if current else store.fingerprint(originals),
            "separation": _separation(remap, originals),
        },
    )
    if request["router"] is not None:
        erasure.hook = RoutingHook(remap, request["router"], pipe._execution_device)
    prove = prover(denoiser, erasure, current)
    if current is not None:
        detach_hook(current)
    attach_hook(denoiser.module, erasure)
    try:
        store.apply(denoiser.module, erasure, prove, keep_originals=keep_originals)
    except BaseException:
        detach_hook(erasure)
        if current is not None:
            attach_hook(denoiser.module, current)
        raise
    return pipe


def _separation(remap: Remap, originals: Mapping[str, Tensor]) -> dict[str, float]:
    """‖W (p_f − p̄_t)‖ of every original layer, all forget prototypes together: what `verify` compares a saved file with."""
    shift = remap.shift().float()
    return {name: float((weight.float() @ shift).norm()) for name, weight in originals.items()}


def _leaks(pipe: DiffusionPipeline, request: Mapping, remap: Remap, denoiser: Denoiser) -> list[str]:
    """What the edit does not cover, in words and numbers."""
    leaks = ["a call with `clip_skip` reads another layer of the text encoder, on which nothing was fitted"]
    encoder = Encoder(pipe)
    kept = dict.fromkeys([*request["retain"], *(name for names in request["remap_to"].values() for name in names)])
    for name, also in request["concepts"].items():
        for surface in (name, *also):
            for other, count in shared_first_tokens(pipe, surface, kept).items():
                moved = remap.moved(encoder.encode([other])[0, 1 : 1 + count])
                leaks.append(
                    f"{other!r} starts with the same {count} token(s) as {surface!r}, which have the same vectors there; "
                    f"they move by {100 * moved:.1f} %"
                )
    if branches := lora_branches(denoiser):
        reads = "reads the routed features too" if request["router"] else "still reads the unedited prompt"
        leaks.append(f"{len(branches)} layers have a LoRA beside them, which {reads}")
    if request["router"] == "random":
        leaks.append("asking twice undoes random routing: two experts on the same prompt determine it")
    return leaks
