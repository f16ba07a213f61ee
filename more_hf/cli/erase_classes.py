"""`more-hf erase-classes`: make an image classifier forget classes, and save it with a record."""

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path

from more_hf.classification.names import find_class, unique_names
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
    refuse_missing_folder,
)


logger = logging.getLogger(__name__)


def add_to(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = add_command(
        commands,
        "erase-classes",
        _erase_classes,
        purpose="make an image classifier forget classes, and save it with a record",
        details="One pass over a folder of images, then the edit in closed form.\n"
        "A class is named by its label, one of the label's synonyms, or its number.\n"
        f"{SEVERAL_PROCESSES.format('erase-classes')}",
        examples=(
            "more-hf erase-classes --model microsoft/resnet-18 --data DIR --forget tench --output OUT",
            "more-hf erase-classes --model MODEL --data DIR --forget 3 7 --remap_to 5 --output OUT",
        ),
    )
    add = parser.add_argument
    add_model(parser, "a folder or a Hub id, with an image processor")
    add(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="images as DIR/CLASS/*.png or DIR/train/CLASS/*.png",
    )
    add(
        "--test",
        type=Path,
        metavar="DIR",
        help="other images, as DIR/CLASS/*.png or DIR/test/CLASS/*.png (else validation, else train): print "
        "every class's accuracy on them, before and after, also for the card",
    )
    add_concepts(parser, "forget", "what to forget", required=True, metavar="CLASS")
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
    add("--batch_size", type=positive, default=32, help="images per call; does not change the result (32)")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to save the classifier to")


def _erase_classes(args: argparse.Namespace) -> int:
    targets = read_remap_to(args.remap_to or ["remain"])
    source = read_model(args)
    for flag, folder in (("--data", args.data), ("--test", args.test)):
        if folder is not None:
            refuse_missing_folder(folder, f"`{flag}` is a folder with one folder of images per class.")

    _refuse_unknown_classes(source, [*args.forget, *(targets or [])])

    from accelerate import PartialState
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import more_hf
    from more_hf.classification.image_folder import HELD_OUT, load_image_folder
    from more_hf.classification.names import class_names

    state = PartialState()
    logger.info("Loading %s for %s", source, state.device)
    model = AutoModelForImageClassification.from_pretrained(source).to(state.device)
    processor = AutoImageProcessor.from_pretrained(source)
    names = class_names(model, model.config.num_labels)
    settings = {"channels": getattr(model.config, "num_channels", 3), "batch_size": args.batch_size}
    more_hf.erase_classes(
        model,
        load_image_folder(args.data, names, processor, **settings),
        args.forget,
        remap_to="remain" if targets == ["remain"] else targets,
        num_experts=args.num_experts,
        router=args.router,
        solver=args.solver,
        seed=args.seed,
        most_lost=args.most_lost,
    )
    if state.is_main_process:
        erasure, table = more_hf.get_erasure(model), None
        if args.test is not None:
            test = load_image_folder(args.test, names, processor, splits=HELD_OUT, **settings)
            table = more_hf.compare(model, test)
            split = f"the {len(test.dataset)} images in {args.test.name} (split {str(test.dataset.split)!r})"
            erasure.facts = replace(erasure.facts, accuracy=table.to_facts(), measured_on=split)
        logger.info("Saving to %s", args.output)
        more_hf.save(model, args.output, include_delta=args.include_delta, processor=processor)
        print(erasure)
        if table is not None:
            print(f"\nPercent of {erasure.facts.measured_on} that are classified rightly:\n\n{table}")
        print(f"\nSaved to {args.output}. Check it with: more-hf verify {args.output}")
    return 0


def _refuse_unknown_classes(model: str, classes: list[str]) -> None:
    """Refuse what is no class of a model in a folder; of a Hub id the library does so, once it is loaded."""
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
