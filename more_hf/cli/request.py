"""The arguments that `more-hf erase` and `more-hf lora` share: what to erase from which pipeline."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from more_hf.core.markdown import markdown_table
from more_hf.core.pictures import Pictures
from more_hf.core.request import ENCODER_BITS, REACHES, TOKENS, ConceptRequest
from more_hf.data import FOLDER

from .checkpoint import Checkpoint, add_placement, find_device, load_pipeline, read_checkpoint
from .concept_list import ConceptList, read_concepts
from .options import (
    EMOJI_SD,
    add_concepts,
    add_import,
    add_model,
    add_remap_to,
    add_solver,
    positive,
    read_model,
    read_remap_to,
    refuse_typo,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


# flags that are arguments of `erase_concept`, which has their defaults
OPTIONS = ("num_experts", "router", "solver", "tokens", "softness", "strength", "seed")
# flags that `--like` stands for
LIKE = (
    *("concept", "concepts_file", "pictures", "alias", "remap_to", "retain", "num_experts"),
    *("solver", "tokens", "reach", "softness", "strength"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to erase from which pipeline."""

    checkpoint: Checkpoint  # the pipeline, not loaded yet
    concepts: Mapping[str, Sequence[str]]  # name -> aliases
    options: dict[str, Any]  # keyword arguments of [`~more_hf.erase_concept`]

    @property
    def edits_denoiser(self) -> bool:
        """Whether layers inside the denoiser are edited, too."""
        return bool(ConceptRequest.of(self.concepts, **self.options).inside)


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add the model and what to erase from it."""
    add = parser.add_argument
    add_model(parser, f"a folder, a checkpoint in one file, a Hub id, or {EMOJI_SD}")
    add_import(parser)
    add_concepts(parser, "concept", "what to erase", default=[])
    add(
        "--concepts_file",
        type=Path,
        metavar="FILE",
        help='a list of what to erase, a line each: "NAME" or "NAME -> TARGET, TARGET"; # starts a comment; '
        "or FILE.toml, with aliases, what to retain and the reach of each (see the examples)",
    )
    add(
        "--pictures",
        type=Path,
        metavar="DIR",
        help="pictures of what to erase, with captions in NAME.txt or metadata.jsonl or none, for --reach "
        "denoiser; --concept says what prompts call it, if they have a name for it",
    )
    add(
        "--like",
        type=Path,
        metavar="DIR",
        help="erase what an erased folder's record says, by default from the model that it says; in place of "
        "the flags from --concept to --softness",
    )
    add(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=ALIAS",
        help='"Van Gogh=Vincent van Gogh"; repeatable',
    )
    add_remap_to(parser, note="; NAME=TARGET is for that one alone", default=[])
    add("--retain", nargs="+", action="extend", metavar="NAME", help="names whose pictures to spare")
    add("--num_experts", type=positive, metavar="N", help="remapping experts (one per target)")
    add_solver(parser)
    add(
        "--tokens",
        choices=TOKENS,
        help="positions of a prompt from which a concept's prototypes are taken (positions: all four kinds)",
    )
    add(
        "--reach",
        choices=REACHES,
        help="which layers to edit: those that read the prompt (name), and all linear layers of the denoiser "
        "(denoiser) or gates in its feed-forward layers (gates) (name)",
    )
    add(
        "--softness",
        type=float,
        metavar="S",
        help="weight on leaving other prompts unchanged, for `--solver soft` and other `--reach`; smaller "
        "values forget more (1)",
    )
    add("--strength", type=float, metavar="S", help="scales the edit: 0.8 leaves some of the concept (1)")
    add(
        "--steps",
        type=positive,
        metavar="N",
        help="of `--reach denoiser` or `gates` and `--compare` (as the model)",
    )
    add("--guidance", type=float, metavar="G", help="their guidance scale (the pipeline's own)")
    add("--seed", type=int, metavar="N", help="draws the experts' targets, and the pictures' noise (0)")
    add_placement(parser)


def read_request(args: argparse.Namespace) -> Request:
    """Read the arguments of `add_request` and check names and files, without heavy imports."""
    if args.like is not None:
        return _recorded(args)
    model = read_model(args)
    listed = ConceptList() if args.concepts_file is None else read_concepts(args.concepts_file)
    names, pictures = _what(args, listed)
    given = {name: getattr(args, name, None) for name in OPTIONS}  # `more-hf lora` has no router
    given["retain"] = [*listed.retain, *(args.retain or [])] or None
    given["reach"] = _reach(args.reach, names, listed)
    options = {"remap_to": _targets(names, args.remap_to, listed), "sampling": _sampling(args, listed)}
    options |= {"given": pictures} if pictures else {}
    options |= {name: value for name, value in given.items() if value is not None}
    concepts = _with_aliases(names, args.alias, listed)
    if model == EMOJI_SD:
        _refuse_typos([name for name in names if name not in pictures], options)
    wanted = ConceptRequest.of(concepts, **options)  # refuses wrong names before anything is loaded
    logger.info("To erase:\n%s", _plan(wanted))
    if model == EMOJI_SD:
        _warn_about_unknown(wanted)
    checkpoint = read_checkpoint(model)
    if args.text_encoder is not None and not checkpoint.in_one_file:
        raise ValueError("`--text_encoder` is for a model in one file; a folder has its own. Leave it out.")
    for flag in ("quantize_text_encoder", "also_encode"):
        if getattr(args, flag) is not None and not (args.layers_only or checkpoint.in_one_file):
            raise ValueError(
                f"`--{flag}` is for `--layers_only`: a whole pipeline is edited with the text encoder that "
                "it runs with. Pass both, or leave it out."
            )
    return Request(checkpoint, concepts, options)


def _what(args: argparse.Namespace, listed: ConceptList) -> tuple[list[str], dict[str, Pictures]]:
    """The names of what to erase, and of these what is given by pictures."""
    for name in args.concept:
        if "=" in name or "->" in name:
            raise ValueError(f"`--concept {name}` is no name. Pass its target by `--remap_to NAME=TARGET`.")
    names = [*args.concept, *listed.concepts]
    if args.pictures is not None:
        if len(names) > 1:
            raise ValueError(
                f"`--pictures` are of one concept, and {len(names)} are named. Name one or none."
            )
        pictures = Pictures(args.pictures, *names)
        return [pictures.label], {pictures.label: pictures}
    if not names:
        raise ValueError(
            "Nothing to erase is named. Pass `--concept NAME`, `--concepts_file FILE`, `--pictures DIR`, or "
            "`--like DIR` for what was erased in DIR."
        )
    return names, {}


def _recorded(args: argparse.Namespace) -> Request:
    """The request in an erased folder's record, without a router: that is not in the weights."""
    if given := [name for name in LIKE if getattr(args, name) not in (None, [])]:
        raise ValueError(f"`--like` takes what to erase from {args.like}. Leave `--{given[0]}` out.")

    from more_hf.core.record import Record  # imports torch

    record = Record.read(args.like)
    if record.kind == "classifier":
        raise ValueError(f"{args.like} holds a classifier. Name the folder of an erased pipeline.")
    if args.model is None and args.model_flag is None:
        args.model = record.facts.base or None
    options = {name: getattr(record.request, name) for name in signature(ConceptRequest).parameters}
    concepts = options.pop("concepts")
    options["router"] = getattr(args, "router", None)
    logger.info("To erase:\n%s", _plan(record.request))
    return Request(read_checkpoint(read_model(args)), concepts, options)


def _refuse_typos(names: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse a name that resembles one of the embedded pipeline's artists."""
    mentioned, targets = [*names, *options.get("retain", [])], options["remap_to"]
    for some_targets in targets.values() if isinstance(targets, Mapping) else [targets]:
        mentioned += some_targets or []
    for name in mentioned:
        refuse_typo(name)


def _warn_about_unknown(wanted: ConceptRequest) -> None:
    """Warn of names that the embedded pipeline's captions do not have: each word of those is a token."""
    vocabulary = json.loads((FOLDER / "emoji_sd" / "tokenizer" / "vocab.json").read_text("utf-8"))
    # a concept that is given by pictures need not be a word of the captions
    named = [name for name in wanted.concepts if name not in wanted.given]
    for name in dict.fromkeys([*named, *wanted.targets, *wanted.retain]):
        if any(f"{word}</w>" not in vocabulary for word in name.casefold().split()):
            logger.warning("%r is in no caption of %s: its pictures do not show it. A typo?", name, EMOJI_SD)


def _plan(wanted: ConceptRequest) -> str:
    """A table of what will be done."""
    rows = []
    for name, targets in wanted.remap_to.items():
        becomes = " and ".join(targets) or "nothing"
        row = {"forgotten": name, "also": ", ".join(wanted.concepts[name]), "becomes": becomes}
        rows.append({**row, "reach": wanted.reach_of(name)})
    spared = f"\nSpared: {', '.join(wanted.retain)}" if wanted.retain else ""
    return markdown_table(rows) + spared


def add_layers_only(parser: argparse.ArgumentParser) -> None:
    """Add the flag that leaves the denoiser on the disk; `read_layers_only` reads it."""
    parser.add_argument(
        "--layers_only",
        action="store_true",
        help="do not load the denoiser, only read the layers to edit from its files; no proof by run then",
    )
    parser.add_argument(
        "--quantize_text_encoder",
        choices=ENCODER_BITS,
        help="with --layers_only: load the text encoder in a half or a quarter of the memory (bitsandbytes)",
    )
    parser.add_argument(
        "--also_encode",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="with --layers_only: further names that the text encoder reads now, so that it need not be "
        "loaded for a later command about them",
    )


def needs_denoiser(flag: str, request: Request) -> ValueError:
    """The error for a flag that needs the denoiser, which is not loaded."""
    why = "`--layers_only` loads none"
    if request.checkpoint.in_one_file:
        why = "of a model in one file none is loaded"
    return ValueError(f"`--{flag}` needs the denoiser, and {why}. Leave that flag out.")


def read_layers_only(args: argparse.Namespace, request: Request) -> dict[str, Any]:
    """
    The keyword arguments that `erase_to_lora` and `erase_to_folder` share.

    Raises:
        ValueError: an argument needs the denoiser.
    """
    if args.offload != "none":
        raise needs_denoiser("offload", request)
    if request.edits_denoiser:
        raise needs_denoiser("reach", request)
    model = request.checkpoint.model
    return {
        "source": FOLDER / "emoji_sd" if model == EMOJI_SD else model,
        "concepts": request.concepts,
        "device": find_device(args.device, "none"),
        **({"text_encoder": args.text_encoder} if request.checkpoint.in_one_file else {}),
        "quantize_text_encoder": args.quantize_text_encoder,
        "also_encode": args.also_encode or (),
        **request.options,
    }


def _sampling(args: argparse.Namespace, listed: ConceptList) -> dict[str, int | float]:
    """How to draw pictures, as arguments of a pipeline's call."""
    sampling = drawing_options(args)
    reaches = {args.reach, *(own.reach for own in listed.concepts.values())}
    if reaches & {"denoiser", "gates"}:
        return sampling
    if sampling and not getattr(args, "compare", None):
        raise ValueError("No picture is drawn with `--reach name`. Leave `--steps` and `--guidance` out.")
    return {}


def drawing_options(args: argparse.Namespace) -> dict[str, int | float]:
    """`--steps` and `--guidance` as arguments of a pipeline's call, where they are given."""
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    return {name: value for name, value in options.items() if value is not None}


def erased_pipeline(
    request: Request, *, dtype: str | None, device: str | None, offload: str, without: Iterable[str] = ()
) -> DiffusionPipeline:
    """
    Load a pipeline as `load_pipeline` does, and erase the request's concepts from it; without offloading
    then.
    """
    import more_hf

    pipe = load_pipeline(request.checkpoint, dtype=dtype, device=device, offload=offload, without=without)
    logger.info("Erasing %s", ", ".join(request.concepts))
    more_hf.erase_concept(pipe, request.concepts, **request.options)
    if offload != "none":
        # Offloaded weights are only stand-ins and could not be saved.
        pipe.remove_all_hooks()
    return pipe


def _targets(
    names: Sequence[str], words: Sequence[str], listed: ConceptList
) -> list[str] | dict[str, list[str] | None] | None:
    """`remap_to` for `erase_concept`: the same targets for all, or a mapping if a name has its own."""
    shared = [word for word in words if "=" not in word] or list(listed.remap_to)
    own = {name: list(about.targets) for name, about in listed.concepts.items() if about.targets}
    for word in words:
        name, equals, target = (part.strip() for part in word.partition("="))
        if equals and not (name and target):
            raise ValueError(f"`--remap_to {word}` is neither TARGET nor NAME=TARGET.")
        if equals:
            own.setdefault(name, []).append(target)
    missing = [name for name in names if name not in own]
    if missing and not shared:
        raise ValueError(
            f"There is no target for {', '.join(map(repr, missing))}. Pass `--remap_to TARGET` for all that "
            "have none of their own, or `--remap_to none`."
        )
    if not own:
        return read_remap_to(shared)
    rest = dict.fromkeys(missing, read_remap_to(shared))
    return {**rest, **{name: read_remap_to(targets) for name, targets in own.items()}}


def _reach(shared: str | None, names: Sequence[str], listed: ConceptList) -> str | dict[str, str] | None:
    """`reach` for `erase_concept`: the same for all, or a mapping if a name has its own."""
    own = {name: about.reach for name, about in listed.concepts.items() if about.reach is not None}
    rest = {} if shared is None else dict.fromkeys(names, shared)
    return {**rest, **own} if own else shared


def _with_aliases(names: Sequence[str], aliases: Sequence[str], listed: ConceptList) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {name: [] for name in names}
    for name, about in listed.concepts.items():
        named[name] += about.aliases
    for pair in aliases:
        name, equals, alias = (part.strip() for part in pair.partition("="))
        if not (name and equals and alias):
            raise ValueError(f"`--alias {pair}` is not of the form NAME=ALIAS.")
        if name not in named:
            raise ValueError(f"`--alias {pair}` is for {name!r}, which is not erased; {list(names)} are.")
        named[name].append(alias)
    return named
