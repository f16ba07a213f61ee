"""`more-hf tune`: find the edits that suit a model, choose one, and save what it leaves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from more_hf.core.request import JUDGES, TRIED_REACHES

from .checkpoint import add_dtype, add_placement, load_pipeline, read_checkpoint
from .options import EMOJI_SD, add_command, add_import, add_model, positive, read_model, refuse_typo
from .request import drawing_options


if TYPE_CHECKING:
    from more_hf.tuning.study import Study

T = TypeVar("T")
GIVEN = ("candidates", "retain", "aliases", "reach", "judge", "pictures", "seed", "batch_size")


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "tune",
        _tune,
        purpose="find the edits that suit a model, by its own pictures, and choose one",
        details="Draws what the original makes of the concept and of other names, fits a judge on these\n"
        "pictures, and tries one edit after the other. On a terminal it asks which to save, and as what.",
        examples=(
            'more-hf tune CompVis/stable-diffusion-v1-4 --concept "Van Gogh"',
            "more-hf tune emoji-sd --concept Blobmoji --steps 10 --guidance 4 --pick 1 --save DIR --yes",
        ),
        resumes=True,
    )
    add = parser.add_argument
    add_model(parser, f"a folder, a Hub id, or {EMOJI_SD}")
    add_import(parser)
    add("--concept", required=True, metavar="NAME", help="what to erase")
    names = {"nargs": "+", "action": "extend", "metavar": "NAME"}
    add("--candidates", **names, help="what it may become (other names of its kind, from the package)")
    add("--retain", **names, help="names whose pictures to spare (the candidates)")
    add("--aliases", **names, help="words to look for aliases in; those that read as the concept go, too")
    add("--reach", choices=TRIED_REACHES, help="denoiser also tries edits inside the denoiser (name)")
    add("--judge", choices=JUDGES, help="clip puts CLIP's zero-shot answer beside the model's own (own)")
    add("--pictures", type=positive, metavar="N", help="of the concept for each edit that stays (24)")
    add("--steps", type=positive, metavar="N", help="denoising steps (the pipeline's default)")
    add("--guidance", type=float, metavar="G", help="classifier-free guidance (the pipeline's default)")
    add("--seed", type=int, metavar="N", help="of the first picture's noise; the others count up (0)")
    add("--batch_size", type=positive, metavar="N", help="pictures per call of the pipeline (8)")
    add("--study", type=Path, metavar="DIR", help="folder of the study, which resumes (tune-NAME)")
    add("--pick", type=positive, metavar="N", help="the edit to save, by its number (asked, or 1)")
    add("--save", type=Path, metavar="DIR", help="save the erased pipeline there (asked)")
    add("--lora", type=Path, metavar="FILE", help="write the edit as a LoRA for the original (asked)")
    add(
        "--push", metavar="NAME/REPO", help="with --save: write to DIR-push what `more-hf push` would publish"
    )
    add("--yes", action="store_true", help="ask nothing")
    add_dtype(parser)
    add_placement(parser)


def _tune(args: argparse.Namespace) -> int:
    if args.push is not None and args.save is None:
        raise ValueError("`--push` prepares what `--save` writes. Add `--save DIR`.")
    model = read_model(args)
    if model == EMOJI_SD:
        for name in (args.concept, *(args.candidates or ()), *(args.retain or ())):
            refuse_typo(name)
    checkpoint = read_checkpoint(model)

    import more_hf
    from more_hf.saving.push import COMPARED

    pipe = load_pipeline(checkpoint, dtype=args.dtype, device=args.device, offload=args.offload)
    given = {name: getattr(args, name) for name in GIVEN}
    options = {name: value for name, value in given.items() if value is not None}
    folder = args.study or Path(f"tune-{args.concept.replace(' ', '-')}")
    study = more_hf.tune(pipe, args.concept, sampling=drawing_options(args), folder=folder, **options)
    print(f"{study}\n\nLook at {folder / 'sheet.webp'}: the same prompts and noise by each edit.")
    pick, save, lora, push = _answers(args, study)
    if save is None and lora is None:
        print(f"Nothing was saved. Again with `--pick {pick} --save DIR`, it goes on from {folder}.")
        return 0
    if args.offload != "none":
        pipe.remove_all_hooks()  # offloaded weights are only stand-ins and could not be saved
    study.erase(pipe, pick)
    print(more_hf.get_erasure(pipe))
    if lora is not None:
        print(f"\nWrote {more_hf.save_lora(pipe, lora)}, for the original at weight 1.")
    if save is not None:
        more_hf.save(pipe, save)
        study.sheet.save(save / COMPARED)  # for the model card
        print(f"\nSaved to {save}. Publish it with: more-hf push {save} {push or 'NAME/REPO'}")
    if push is not None:
        ready = more_hf.push_to_hub(save, push, dry_run=save.with_name(f"{save.name}-push"))
        print(f"Look at {ready} first: it holds what that would publish.")
    return 0


def _answers(args: argparse.Namespace, study: Study) -> tuple[int, Path | None, Path | None, str | None]:
    """The number of an edit, the folder, the file and the repository: by flags, or asked on a terminal."""
    pick, save, lora, push = args.pick, args.save, args.lora, args.push
    if args.yes or not sys.stdin.isatty():
        return pick or 1, save, lora, push
    pick = pick or _ask_number(study)
    save = save or _ask("Save the erased pipeline to which folder?", Path)
    lora = lora or _ask("Write the edit as a LoRA to which file?", Path)
    if save is not None:
        push = push or _ask("Prepare a push of it to which repository, NAME/REPO?", str)
    return pick, save, lora, push


def _ask(question: str, kind: Callable[[str], T]) -> T | None:
    """An answer, or `None`."""
    answer = input(f"{question} (none) ").strip()
    return kind(answer) if answer else None


def _ask_number(study: Study) -> int:
    """The number of one of the choices, by the user; the first without an answer."""
    while True:
        answer = input(f"Which edit, 1 to {len(study.choices)}? (1) ").strip() or "1"
        if answer.isdecimal() and 1 <= int(answer) <= len(study.choices):
            return int(answer)
