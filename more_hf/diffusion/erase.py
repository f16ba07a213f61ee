"""`erase_concept`, `restore` and `get_erasure` for pipelines."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from ..core.errors import AlreadyErasedError, SiteNotFoundError
from ..core.facts import ConceptFacts, is_text, kind_of
from ..core.install import install, refuse_inside_block, uninstall
from ..core.pictures import Pictures
from ..core.record import refuse_erased_source
from ..core.registry import check_restorable, find_erasure, locked, require_editable, require_erased
from ..core.remap import Remap
from ..core.request import ConceptRequest, read_names, with_options
from ..core.site import Site, copy_weights, fingerprint
from ..core.views import original_shown
from .activations import (
    UntouchedSite,
    edited_sites,
    find_activation_sites,
    named_sites,
    record_activations,
    refuse_quantized,
)
from .encoder import Encoder, shared_first_tokens
from .erasure import ConceptErasure
from .gates import Gates, find_gates
from .hook import hooked_modules, make_hooks
from .plan import MAX_COST, MOST_MOVED, Solution, solve
from .proof import prover
from .sites import (
    as_pipeline,
    base_layer,
    check_widths,
    find_denoiser,
    find_layers,
    find_sites,
    lora_branches,
)


logger = logging.getLogger(__name__)

BESIDE = "the edit is a LoRA beside the weights: it tells what was erased, and without it the concept is back"


@with_options
def erase_concept(
    pipe: DiffusionPipeline,
    concepts: str | Pictures | Sequence[str | Pictures] | Mapping[str | Pictures, Sequence[str]],
    *,
    remap_to: str | Sequence[str] | Mapping[str, str | Sequence[str] | None] | None,
    keep_originals: bool = True,
    **options: Any,
) -> DiffusionPipeline:
    """
    Erase concepts from a pipeline, in place, and return it: in closed form, without training.

    The mean expert is merged into the weight of every layer of the denoiser that reads the prompt. Names,
    shapes and dtypes do not change, so every tool that saves or copies the pipeline copies the erased one. If
    two denoisers take turns, as in Wan 2.2, both are edited. On a pipeline that was erased before, all its
    concepts are fitted again jointly, from the kept originals. A second thread that erases or restores the
    same pipeline waits.

    Args:
        pipe (`DiffusionPipeline`):
            A pipeline of a family in `more_hf/diffusion/families.py`, in fp16, bf16, fp32 or fp64, on any
            device.
        concepts (`str`, [`Pictures`], or a `Sequence` or `Mapping[str | Pictures, Sequence[str]]` of them):
            What to forget; a mapping gives each name's aliases. With `reach="denoiser"`, a folder of pictures
            can stand for a name, and with `"gates"` for the pictures of one.
        remap_to (`str`, `Sequence[str]`, `Mapping[str, str | Sequence[str] | None]` or `None`):
            What the concepts become. With several names, their mean, or one per expert with a router. `None`
            projects the concepts out and puts nothing in their place. A mapping gives each concept its own.
        keep_originals (`bool`, *optional*, defaults to `True`):
            Keep the edited layers' original weights in CPU memory for `restore`.
        retain (`Sequence[str]`, *optional*):
            Names to protect. `pinv` keeps their prototypes exactly where they are, like the begin token's and
            the empty prompt's; the other solvers count their prompts among the ordinary ones. The report says
            how far they move.
        num_experts (`int`, *optional*):
            How many experts draw their targets from `remap_to`; by default as many as use each equally.
        router (`str`, *optional*):
            `"random"` (the paper: one expert per call and sample) or `"hash"` (a function of the prompt);
            lives in this process only. By default the mean expert alone, so that what you see is what is
            saved.
        solver (`str`, *optional*, defaults to `"auto"`):
            `"pinv"` (the paper), `"covariance"` (exact, and ordinary prompts move least) or `"soft"` (leaves
            a part of the way for the sake of ordinary prompts). `"auto"` erases a concept alone exactly,
            and several while that moves ordinary prompts by at most 12 %, if need be with `"last+end"`
            for tokens; beyond that softly, with all positions while that moves them by at most 20 %. No list
            is too long. The report says what was taken and why.
        tokens (`str`, *optional*, defaults to `"positions"`):
            Which prompt positions make prototypes: `"positions"` (the name's last token, the tokens after it,
            the end token and the padding, one prototype each), `"last+end"`, `"subject"`, `"end"`,
            `"subject+end"`, `"last"`.
        pooled (`bool`, *optional*, defaults to `True`):
            Also edit the layer that reads the pooled prompt embedding (Stable Diffusion XL and 3, FLUX).
            Without it the concept still reaches the model there, and the report says so.
        reach (`str` or `Mapping[str, str]`, *optional*, defaults to `"name"`):
            `"name"` edits the layers that read the prompt: the name no longer says anything, and whoever
            learns another word for the concept from pictures finds it again. `"denoiser"` also edits every
            other linear layer and 1×1 convolution of the denoiser's blocks, by what these read of pictures
            that the original draws: of the concept, of its targets, of retained names and of ordinary
            prompts. That is a regression, exact in nothing, and it changes other pictures more: what a
            learned word still finds, and what it costs, is in `benchmarks/attacks/pictures/reach`. Its
            statistics take memory while it works: 4.6 GB for Stable Diffusion v1.4, 35 GB for XL, 244 GB for
            FLUX.1, half as much again with `retain`. They are where the denoiser's weights are: of a pipeline
            with `enable_model_cpu_offload()`, in the CPU's memory. `"gates"` instead rewrites two hidden
            units of each feed-forward layer for each concept, except in the widest blocks: they open on what
            only the concept's pictures give, and write a step to the target. Thresholds are from pictures
            that did not fit the gates. It exists for UNets of Stable Diffusion and transformers with the same
            blocks, unless these layers are quantized. What several concepts cost other pictures inside the
            denoiser adds up; a mapping gives each its own reach.
        softness (`float`, *optional*, defaults to 1.0):
            Of `"soft"` and inside the denoiser: how much leaving ordinary features alone weighs against
            moving forgotten ones. Smaller forgets more, larger spares more. It divides what gates write.
        strength (`float`, *optional*, defaults to 1.0):
            Multiplies the change of every weight, up to 1.5. Below 1 some of the concept is left, above 1 its
            prompts go beyond the target. Nothing is exact then, and a router is refused. `save` takes 0.5 and
            more, since a weaker edit cannot be told from the original.
        sampling (`Mapping[str, int | float | bool | str]`, *optional*):
            Arguments of the pipeline's call with which those pictures are drawn, such as
            `{"num_inference_steps": 20}`. Fewer steps and smaller pictures are faster.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw of targets for experts. No global random state is touched.
        templates, everyday, shrinkage, pictures, given (*optional*):
            Options for research: see `more_hf.core.request.ConceptRequest`, whose fields all of these are.

    Returns:
        `DiffusionPipeline`: the same pipeline.

    Raises:
        `PrototypeError`: a name or an option is wrong, or no exact edit exists. `SiteNotFoundError`: the
        pipeline cannot be edited as it is. `AlreadyErasedError`: it was erased and its originals are not
        available. The pipeline is then unchanged, as it is after an interruption.

    The defaults were measured on the embedded pipeline, four styles erased in turn, 136 pictures a setting:
    `"positions"` left 0 % of the pictures recognizable, every single kind of token 2 to 10 %; `"pinv"` moved
    other artists 2.7 times as far (LPIPS) as `"covariance"`; two or more targets left 2 to 8 % where one left
    none (`benchmarks/artists/defaults.csv`).

    Source: MoRE, Eq. 4 to 6 and Algorithm 1, on the cross-attention inputs; the token positions, the soft
    solver and the reach are ours. For one target, `"pinv"` is Double Projections (CVPR 2026) and
    `"covariance"` ErasePro's constrained least squares (arXiv 2508.04472).

    Example:

        >>> import more_hf
        >>> pipe = more_hf.load_emoji_sd()
        >>> pipe = more_hf.erase_concept(pipe, "Blobmoji", remap_to=["Fluent"])
        >>> image = pipe("a cat face in the style of Blobmoji", num_inference_steps=10).images[0]
    """
    request = ConceptRequest.of(concepts, remap_to=remap_to, **options)
    return erase(pipe, request, keep_originals=keep_originals)


def erase(
    pipe: DiffusionPipeline, request: ConceptRequest, *, keep_originals: bool = True
) -> DiffusionPipeline:
    """`erase_concept` for a request."""
    denoiser = find_denoiser(pipe)
    # The lock is the denoiser's, since two pipelines can share one.
    with locked(denoiser.module):
        check_in_place(pipe)
        current = require_editable(denoiser.module)
        if current is None:
            # The weights may come from a folder that was saved erased: its originals are not here.
            source = pipe.config.get("_name_or_path")
            refuse_erased_source(
                source, lambda record: edited_sites(pipe, denoiser, record.request, record.facts)
            )
        else:
            # Two edits in a row would not be exact for the first, so both are fitted again as one.
            request = current.request.joined(request)
            _refuse_other_way(current.request, request)
        _fit(Encoder.of(pipe, request, denoiser), request, keep_originals)
    return pipe


def restore(pipe: DiffusionPipeline, concepts: str | Sequence[str] | None = None) -> DiffusionPipeline:
    """`more_hf.restore` for pipelines."""
    denoiser = find_denoiser(pipe)
    with locked(denoiser.module):
        check_in_place(pipe)
        erasure = require_erased(denoiser.module)
        names = erasure.concepts if concepts is None else read_names("concepts", concepts)
        check_restorable(erasure, names)
        if set(names) == set(erasure.concepts):
            uninstall(denoiser.module, hooked_modules(denoiser))
        else:
            request = erasure.request.without(names)
            _fit(Encoder.of(pipe, request, denoiser), request, keep_originals=True)
    return pipe


def get_erasure(pipe: DiffusionPipeline) -> ConceptErasure | None:
    """`more_hf.get_erasure` for pipelines."""
    for part in as_pipeline(pipe).components.values():
        erasure = find_erasure(unwrap_module(part)) if isinstance(part, nn.Module) else None
        if erasure is not None:
            return erasure
    return None


def edited_module(pipe: DiffusionPipeline) -> nn.Module:
    """The pipeline's denoiser, which `api` locks."""
    return find_denoiser(pipe).module


def check_in_place(pipe: DiffusionPipeline) -> None:
    """
    Raises `SiteNotFoundError` unless the denoiser still reads the prompt through the layers that were edited.

    Projections that have been fused since then read a copy of the edited weights, which neither `restore` nor
    `disabled` reaches.
    """
    denoiser = find_denoiser(pipe)
    erasure = find_erasure(denoiser.module)
    if erasure is None:
        return
    # Named modules, and readers under the names that the family gives them.
    modules = {name: base_layer(module) for name, module in denoiser.module.named_modules()}
    modules |= {name: reader.module for name, reader in find_layers(denoiser, pooled=True).items()}
    if other := [name for name in erasure.sites if name not in modules]:
        raise SiteNotFoundError(
            f"{', '.join(map(repr, erasure.concepts))} was erased from a pipeline with a different number of "
            f"denoisers, of which this {type(pipe).__name__} has only one ({denoiser.name}; there is no "
            f"`{other[0]}` here). Call on the pipeline that was edited, or restore that one first."
        )
    if replaced := [name for name, site in erasure.sites.items() if modules[name] is not site.module]:
        raise SiteNotFoundError(
            f"{len(replaced)} edited layers were replaced since the edit (first: `{replaced[0]}`). "
            "Put the edited layers back, or erase again from the original model; quantize what was saved."
        )


def _refuse_other_way(earlier: ConceptRequest, request: ConceptRequest) -> None:
    """Raises `AlreadyErasedError` if layers inside the denoiser were edited in another way before."""
    if earlier.inside and earlier.gated != request.gated:
        raise AlreadyErasedError(
            f"{', '.join(map(repr, earlier.inside))} was erased with `reach={earlier.reach!r}`, which "
            f"changes some of the layers that {request.reach!r} would, in another way. Restore it first "
            "(`more_hf.restore`), then erase everything at once."
        )


def _fit(encoder: Encoder, request: ConceptRequest, keep_originals: bool) -> None:
    """Solve, merge, hook and prove: all of it, or the pipeline stays what it was."""
    pipe, denoiser = encoder.pipe, encoder.denoiser
    current = find_erasure(denoiser.module)
    refuse_inside_block(current)
    # 1. Find the layers that read text, and solve for their edit.
    sites = named_sites(pipe, denoiser, request)
    solution = solve(encoder, request)
    soft = request.inside or solution.remaps["tokens"].solver == "soft"
    if request.softness != ConceptRequest.softness and not soft:
        logger.warning(
            "softness=%g has no effect: the edit is exact (%s). Pass solver='soft' for a soft one.",
            request.softness,
            solution.remaps["tokens"].solver,
        )
    ordinary = solution.ordinary_moved
    if ordinary > MOST_MOVED:
        logger.warning(
            "Ordinary prompts move by %.1f %%. Beyond %.0f %%, pictures of forgotten names often show "
            "nothing in particular instead of the targets. Look at some, and erase fewer names at once.",
            100 * ordinary,
            100 * MOST_MOVED,
        )
    # A retained name's worst prototype moves about as far as ordinary prompts do; that alone is no harm.
    visible = max(ordinary, MAX_COST)
    if far := [name for name, moved in solution.retained_moved.items() if moved > visible]:
        logger.warning(
            "%s: moves farther than ordinary prompts do (%.1f %%), although retained. Pass solver='pinv', "
            "which keeps it exactly, or another target.",
            ", ".join(f"{name} ({100 * solution.retained_moved[name]:.1f} %)" for name in far),
            100 * ordinary,
        )
    # 2. Inside the denoiser, pictures by the original give the features.
    gates = None
    if request.inside:
        sent_to = solution.inside(request)
        if not request.gated:
            refuse_quantized(denoiser)
        with nullcontext() if current is None else original_shown(current):
            if request.gated:
                found = gates = find_gates(pipe, denoiser, request, sent_to)
            else:
                found = record_activations(pipe, denoiser, request, sent_to)
                solution = solution.with_activations(found, request)
        sites |= find_activation_sites(denoiser, found.spaces)
    if current is not None:  # what the plain layers took the place of
        for name in sites.keys() & current.sites.keys():
            sites[name].quantized = current.sites[name].quantized
    # 3. Take the originals of an earlier erasure, and copy the layers that it did not edit.
    earlier = current.originals if current else {}
    fresh = copy_weights({name: site for name, site in sites.items() if name not in earlier}, "cpu")
    originals = {name: earlier[name] if name in earlier else fresh[name] for name in sites}
    # 4. Merge, hook and prove in one transaction.
    erasure = _erasure(encoder, request, solution, sites, originals, current, gates)
    erasure.hooks = make_hooks(denoiser, erasure, pipe._execution_device)
    logger.info("Running the denoiser before and after the edit")
    prove = prover(denoiser, erasure, current)
    install(denoiser.module, erasure, hooked_modules(denoiser), prove, keep_originals=keep_originals)


def erasure_of_layers(encoder: Encoder, request: ConceptRequest) -> ConceptErasure:
    """
    The erasure by name of a denoiser of which only the layers that read text were loaded.

    Changes nothing and runs nothing: that no other layer reads text is taken from its family's description.

    Raises:
        `PrototypeError` and `SiteNotFoundError`: as from `erase_concept`.
    """
    sites = find_sites(encoder.pipe, encoder.denoiser, pooled=request.pooled)
    solution = solve(encoder, request)
    return _erasure(encoder, request, solution, sites, copy_weights(sites, "cpu"), None)


def erasure_beside(pipe: DiffusionPipeline, request: ConceptRequest) -> ConceptErasure:
    """
    The erasure of a pipeline for a LoRA beside its weights, which may be quantized. Changes nothing.

    Raises:
        `PrototypeError` and `SiteNotFoundError`: as from `erase_concept`. `AlreadyErasedError`: it is erased.
    """
    denoiser = find_denoiser(pipe)
    with locked(denoiser.module):
        if (current := find_erasure(denoiser.module)) is not None:
            raise AlreadyErasedError(
                f"{', '.join(map(repr, current.concepts))} was erased from this pipeline, and a LoRA is for "
                "the original. Restore it first (`more_hf.restore`), or write what was erased by "
                "`more_hf.save_lora`."
            )
        encoder = Encoder.of(pipe, request, denoiser)
        sites = named_sites(pipe, denoiser, request)
        for site in sites.values():
            site.quantized = None  # it is read, and keeps its place
        solution = solve(encoder, request)
        if request.inside:
            activations = record_activations(pipe, denoiser, request, solution.inside(request))
            solution = solution.with_activations(activations, request)
            sites |= find_activation_sites(denoiser, activations.spaces, kind=UntouchedSite)
        erasure = _erasure(encoder, request, solution, sites, _Originals(sites), None)
    erasure.facts = replace(erasure.facts, leaks=[*erasure.facts.leaks, BESIDE])
    return erasure


class _Originals(Mapping[str, Tensor]):
    """Each site's weight, read when it is asked for: dequantized, all of them may not fit into the memory."""

    def __init__(self, sites: Mapping[str, Site]):
        self.sites = sites

    def __getitem__(self, name: str) -> Tensor:
        return self.sites[name].read().to("cpu", copy=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def _guarantees(remaps: Mapping[str, Remap]) -> dict[str, float]:
    """
    The measurements of `Remap.verify`; those of other spaces than `"tokens"` have their kind as a prefix, and
    of several spaces of one kind only the worst is given.
    """
    guarantees: dict[str, float] = {}
    for space, remap in remaps.items():
        kind = kind_of(space)
        for key, value in remap.verify(mean_only=kind == "denoiser").items():
            name = key if kind == "tokens" else f"{kind}_{key}"
            guarantees[name] = max(value, guarantees.get(name, value))
    return guarantees


def _erasure(
    encoder: Encoder,
    request: ConceptRequest,
    solution: Solution,
    sites: dict[str, Site],
    originals: dict[str, Tensor],
    current: ConceptErasure | None,
    gates: Gates | None = None,
) -> ConceptErasure:
    """The erasure that a solution and gates make of these layers, nothing of which is written yet."""
    pipe, remaps = encoder.pipe, dict(solution.remaps)
    rewrites, moved = ({}, {}) if gates is None else (gates.rewrites(originals), gates.moved)
    reading = {name: site for name, site in sites.items() if name not in rewrites}
    check_widths(reading, {space: len(remap.prototypes.matrix) for space, remap in remaps.items()})
    first = next(iter(remaps.values()))
    quantized = {name: site.quantized for name, site in sites.items() if site.quantized is not None}
    facts = ConceptFacts(
        solver=first.solver,
        solver_reason=solution.solver_reason,
        retained_moved=solution.retained_moved,
        rank=max(factors.rank for factors in (*remaps.values(), *rewrites.values())),
        num_experts=first.num_experts,
        condition_number=max(remap.condition_number for remap in remaps.values()),
        leaks=_leaks(encoder, request, remaps),
        base=current.facts.base if current else str(pipe.config.get("_name_or_path") or ""),
        pipeline=type(pipe).__name__,
        device=_name_of(encoder.device),
        fingerprint=fingerprint(originals),
        spaces={name: site.space for name, site in sites.items() if site.space != "tokens"},
        tokens=solution.tokens if solution.tokens != request.tokens else None,
        fitted_on=encoder.precisions,
        dequantized={name: pair.scheme for name, pair in quantized.items()},
        extra_bytes=sum(pair.extra_bytes for pair in quantized.values()),
    )
    guarantees = {**_guarantees(remaps), **moved}
    # Inside a large denoiser the second moments take gigabytes, and with these measured nothing reads them.
    for space in [space for space in remaps if not is_text(space)]:
        prototypes = replace(remaps[space].prototypes, second_moment=None)
        remaps[space] = replace(remaps[space], prototypes=prototypes)
    return ConceptErasure(request, facts, sites, remaps, originals, guarantees, rewrites=rewrites)


def _name_of(device: torch.device) -> str:
    """A device's kind, and which one, as far as results depend on it."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{device.type} ({processor}, {torch.get_num_threads()} threads)"


def _leaks(encoder: Encoder, request: ConceptRequest, remaps: Mapping[str, Remap]) -> list[str]:
    """What the edit does not cover, in words and numbers."""
    leaks = list(encoder.text.leaks)
    readers = encoder.denoiser.find()
    unedited = [name for name, reader in readers.items() if reader.space == "pooled" and not request.pooled]
    # 1. A pooled embedding that the user chose to leave.
    if unedited:
        leaks.append(
            "the pooled prompt embedding was left as it is, so what it says about the concept still enters "
            f"through `{unedited[0]}`"
        )
    # 2. In a causal encoder equal beginnings are equal features, which cannot stay and go at once.
    kept = dict.fromkeys([*request.retain, *request.targets])
    for surface in request.surfaces:
        for other, count in shared_first_tokens(encoder, surface, kept).items():
            segment, features = encoder.causal_segment, encoder.features([other])
            start = encoder.layout(other, segment).start
            moved = max(
                remaps[space].moved(features[space][0, start : start + count]) for space in segment.spaces
            )
            leaks.append(
                f"{other!r} starts with the same {count} token(s) as {surface!r}, which have the same "
                f"vectors there; they move by {100 * moved:.1f} %"
            )
    # 3. A LoRA reads the same features by weights of its own.
    if branches := lora_branches(encoder.denoiser):
        reads = "reads the routed features too" if request.router else "still reads the unedited prompt"
        leaks.append(f"{len(branches)} layers have a LoRA beside them, which {reads}")
    if request.router == "random":
        leaks.append("asking twice undoes random routing: two experts on the same prompt determine it")
    return leaks
