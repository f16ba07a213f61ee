"""`erase_concept` and what belongs to it: the request, the routing hook, the proof by run, restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from ..core import erasure as store
from ..core.erasure import Erasure
from ..core.errors import MoreError
from ..core.hook import detach_hook
from ..core.remap import Remap
from ..saving.record import refuse_erased_source
from .encoder import Encoder, shared_first_tokens
from .hook import attach_hook, make_hook
from .plan import make_request, solve
from .proof import prover
from .sites import Denoiser, check_widths, find_denoiser, find_sites, lora_branches
from .text import text_of


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
    pooled: bool = True,
    keep_originals: bool = True,
    seed: int = 0,
) -> DiffusionPipeline:
    """Erase concepts from a pipeline, in place, and return it: in closed form, without training.

    Every layer of the denoiser that reads the prompt gets the mean expert merged into its weight; names, shapes and dtypes stay as
    they are, so that every tool which saves or copies the pipeline copies the erased one. On a pipeline that was erased before, all
    its concepts are fitted again jointly, from the kept originals.

    Args:
        pipe (`DiffusionPipeline`): a pipeline of Stable Diffusion 1.x, 2.x, XL or 3, FLUX or PixArt, in fp16, bf16, fp32 or fp64, on
            any device.
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
        pooled (`bool`, defaults to `True`): also edit the layer that reads the pooled prompt embedding (Stable Diffusion XL and 3,
            FLUX). Without it the concept still reaches the model there, and the report says so.
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
    request = make_request(concepts, remap_to, retain, num_experts, router, solver, tokens, seed, pooled)
    denoiser = find_denoiser(pipe)
    current = store.require_editable(denoiser.module)
    if current is None:
        source = pipe.config.get("_name_or_path")
        refuse_erased_source(source, lambda record: find_sites(pipe, denoiser, pooled=record.request["pooled"]))
    else:
        old = current.request
        request["concepts"] = {**old["concepts"], **request["concepts"]}
        request["remap_to"] = {**old["remap_to"], **request["remap_to"]}
        request["retain"] = list(dict.fromkeys([*old["retain"], *request["retain"]]))
        request["pooled"] = old["pooled"] or request["pooled"]
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


def _fit(pipe: DiffusionPipeline, denoiser: Denoiser, request: dict[str, Any], keep_originals: bool) -> DiffusionPipeline:
    """Prototypes, dual, merge, hook, proof: all of it, or the pipeline is what it was."""
    current = store.find_erasure(denoiser.module)
    sites = find_sites(pipe, denoiser, pooled=request["pooled"])
    remaps, solution = solve(pipe, request)
    check_widths(sites, {space: len(found.prototypes.matrix) for space, found in remaps.items()})
    kept = current.originals if current else {}
    originals = {name: kept[name] if name in kept else site.read().to("cpu", copy=True) for name, site in sites.items()}
    remap = remaps["tokens"]
    guarantees = {space: found.verify() for space, found in remaps.items()}
    erasure = Erasure(
        request=request,
        remap=remap,
        remaps={name: remaps[site.space] for name, site in sites.items() if site.space != "tokens"},
        sites=sites,
        originals=originals,
        guarantees={
            **guarantees["tokens"],
            **{f"pooled_{key}": value for key, value in guarantees.get("pooled", {}).items()},
        },
        proof={},
        facts={
            **solution,
            "rank": remap.rank,
            "num_experts": remap.num_experts,
            "condition_number": max(found.condition_number for found in remaps.values()),
            "leaks": _leaks(pipe, request, remap, denoiser),
            "base": current.facts["base"] if current else str(pipe.config.get("_name_or_path") or ""),
            "pipeline": type(pipe).__name__,
            "fingerprint": store.fingerprint(originals),
            "separation": {name: _separation(originals[name], remaps[site.space]) for name, site in sites.items()},
            "spaces": {name: site.space for name, site in sites.items() if site.space != "tokens"},
        },
    )
    if erasure.router is not None:
        erasure.hook = make_hook(denoiser, erasure, pipe._execution_device)
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


def _separation(original: Tensor, remap: Remap) -> float:
    """‖W (p_f − p̄_t)‖ of an original layer, all forget prototypes together: what `verify` compares a saved file with."""
    return float((original.float() @ remap.shift().float()).norm())


def _leaks(pipe: DiffusionPipeline, request: Mapping, remap: Remap, denoiser: Denoiser) -> list[str]:
    """What the edit does not cover, in words and numbers."""
    leaks = list(text_of(pipe).leaks)
    left = [name for name, reader in denoiser.family.find(denoiser.module).items() if reader.space == "pooled" and not request["pooled"]]
    if left:
        leaks.append(f"the pooled prompt embedding was left as it is: what it says of the concept still enters through `{left[0]}`")
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
