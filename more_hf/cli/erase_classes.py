"""`more-hf erase-classes`: make a classifier forget classes, and save it with a record."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from more_hf.classification.names import find_class, unique_names
from more_hf.core.markdown import markdown_table
from more_hf.core.request import EXACT_SOLVERS

from .options import (
    SEVERAL_PROCESSES,
    add_command,
    add_concepts,
    add_model,
    add_router,
    add_solver,
    positive,
    read_model,
    read_remap_to,
    refuse_missing_model,
)


if TYPE_CHECKING:
    from more_hf.core.request import ClassRequest

LISTED = 20  # classes that stay, named at most

logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "erase-classes",
        _erase_classes,
        purpose="make a classifier forget classes, and save it with a record",
        details="Of images, videos, sounds or texts. One pass over them, then the edit in closed form.\n"
        "A class is named by its label, one of the label's synonyms, or its number.\n"
        f"{SEVERAL_PROCESSES.format('erase-classes')}",
        examples=(
            "more-hf erase-classes --model microsoft/resnet-18 --data DIR --forget tench --output OUT",
            "more-hf erase-classes --model MODEL --data DIR --forget 3 7 --remap_to 5 --output OUT",
        ),
    )
    add = parser.add_argument
    add_model(parser, "a folder or a Hub id, with its processor or tokenizer")
    add(
        "--data",
        required=True,
        metavar="DIR",
        help="samples as DIR/CLASS/*.png (.wav, .mp4, .txt) or DIR/train/CLASS/*; or what `datasets` "
        "opens: .csv, .jsonl or .parquet in DIR, or a Hub id",
    )
    add(
        "--test",
        "--eval",
        metavar="DIR",
        help="samples to measure every class's accuracy on, before and after, also for the card: "
        "DIR/test/CLASS/* (else validation, else train) or DIR/CLASS/* (the same of --data)",
    )
    add_concepts(parser, "forget", "what to forget", default=[], metavar="CLASS")
    add("--forget_file", type=Path, metavar="FILE", help="a list of what to forget, a class a line")
    add(
        "--remap_to",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="what they are sent to; remain for every other class, none erases without remapping (remain)",
    )
    add("--num_experts", type=positive, metavar="N", help="remapping experts (one for each target)")
    add_router(parser)
    add_solver(parser, EXACT_SOLVERS, default="auto")
    add(
        "--most_lost",
        type=float,
        default=20.0,
        metavar="POINTS",
        help="percentage points of the other classes' accuracy that may be lost, by an estimate (20)",
    )
    add("--seed", type=int, default=0, help="draws the experts' targets (0)")
    add("--batch_size", type=positive, default=32, help="samples per call (32)")
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="keeps what the pass over --data has found; the same command goes on where it was killed",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder to save the classifier to")


def _erase_classes(args: argparse.Namespace) -> int:
    targets = read_remap_to(args.remap_to or ["remain"])
    source = read_model(args)
    for flag, data in (("--data", args.data), ("--test", args.test)):
        if data is not None:
            refuse_missing_model(data, f"`{flag}` is a folder with one folder of samples per class.")
    forget = [*args.forget, *_listed(args.forget_file)]
    if not forget:
        raise ValueError("Nothing to forget is named. Pass `--forget CLASS` or `--forget_file FILE`.")
    _refuse_unknown_classes(source, [*forget, *(targets or [])])

    from accelerate import PartialState
    from transformers import AutoConfig

    import more_hf
    from more_hf.classification.compare import note
    from more_hf.classification.kinds import class_of, kind_of
    from more_hf.classification.plan import check_request, make_request
    from more_hf.classification.samples import HELD_OUT, load_samples

    config = AutoConfig.from_pretrained(source)
    opener = class_of(config)
    kind = kind_of(opener.__name__)
    names = unique_names([config.id2label[number] for number in range(config.num_labels)])
    options = {
        "remap_to": "remain" if targets == ["remain"] else targets,
        **{name: getattr(args, name) for name in ("num_experts", "router", "solver", "seed")},
    }
    request = make_request(names, forget, head=(), at=None, **options)
    check_request(names, request)
    logger.info("To forget:\n%s", _plan(request, names))
    state = PartialState()
    logger.info("Loading %s for %s", source, state.device)
    model = opener.from_pretrained(source).to(state.device)
    processor = kind.processor.from_pretrained(source)
    settings = {"model": model, "processor": processor, "batch_size": args.batch_size}
    data = load_samples(args.data, **settings)
    more_hf.erase_classes(model, data, forget, most_lost=args.most_lost, resume=args.resume, **options)
    if state.is_main_process:
        test = load_samples(args.test or args.data, splits=HELD_OUT, **settings)
        found = more_hf.compare(model, test)
        place, split = Path(args.test or args.data).name, str(test.dataset.split)
        measured_on = f"the {len(test.dataset)} {kind.name} in {place} (split {split!r})"
        note(model, found, measured_on)
        logger.info("Saving to %s", args.output)
        more_hf.save(model, args.output, include_delta=args.include_delta, processor=processor)
        found.to_picture().save(args.output / "compare.png")
        print(more_hf.get_erasure(model))
        print(f"\nPercent of {measured_on} that are classified rightly:\n\n{found}")
        print(f"\nSaved to {args.output}, with a picture of the confusions, compare.png.")
        print(f"Check it with: more-hf verify {args.output}")
    return 0


def _listed(file: Path | None) -> list[str]:
    """The classes of a file, whose lines are names or numbers."""
    lines = [] if file is None else file.read_text("utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _plan(request: ClassRequest, names: tuple[str, ...]) -> str:
    """A table of what will be done, and the classes that stay."""
    becomes = "the mean of all that stay" if request.router is None else "one of those that stay"
    rows = []
    for name, targets in request.remap_to.items():
        given = " and ".join(targets) or "nothing"
        sent = becomes if targets == "remain" else given
        rows.append({"class": names.index(name), "forgotten": name, "becomes": sent})
    stay = [name for name in names if name not in request.concepts]
    more = f" and {len(stay) - LISTED} more" if len(stay) > LISTED else ""
    return f"{markdown_table(rows)}\n{len(stay)} classes stay: {', '.join(stay[:LISTED])}{more}"


def _refuse_unknown_classes(model: str, classes: list[str]) -> None:
    """Refuse what is no class of a model in a folder, before anything heavy is imported."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text("utf-8"))
    labels = config.get("id2label", {})
    # timm has a list of them
    names = unique_names(config.get("label_names") or [labels[number] for number in sorted(labels, key=int)])
    for name in classes:
        if names and name != "remain":
            find_class(names, name)
