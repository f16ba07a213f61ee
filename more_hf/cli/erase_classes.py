"""`more-hf erase-classes`: image classifiers."""

import argparse
from pathlib import Path

from .options import positive, read_remap_to


ROUTERS = ("random", "hash", "prototype", "prototype_random")
SOLVERS = ("auto", "pinv", "covariance")


def add_commands(commands) -> None:
    """Add it to the parser's sub-commands."""
    parser = commands.add_parser(
        "erase-classes",
        help="make an image classifier forget classes, and save it with a record",
        description="One pass over a folder of images, then the edit in closed form. A class is named by its label, one of the label's "
        "synonyms, or its number. `accelerate launch -m more_hf erase-classes ...` splits the pass over processes.",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="a folder or a Hub id, with an image processor")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="images as DIR/CLASS/*.png or DIR/train/CLASS/*.png")
    parser.add_argument("--forget", nargs="+", action="extend", required=True, metavar="CLASS", help="what to forget")
    parser.add_argument(
        "--remap_to",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="what they are sent to; remain for every other class, none erases without remapping (remain)",
    )
    parser.add_argument("--num_experts", type=positive, metavar="N", help="remapping experts (one for each target; one without a router)")
    parser.add_argument("--router", choices=ROUTERS, help="the saved weights hold the mean expert with any")
    parser.add_argument("--solver", choices=SOLVERS, default="auto", help="(auto)")
    parser.add_argument("--seed", type=int, default=0, help="draws the experts' targets (0)")
    parser.add_argument("--batch_size", type=positive, default=32, help="images per call; does not change the result (32)")
    kept = "also save the factors, which put router and forgotten features back on loading, and give the class back to whoever has them"
    parser.add_argument("--include_delta", action="store_true", help=kept)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to save the classifier to")
    parser.set_defaults(run=_erase_classes)


def _erase_classes(args: argparse.Namespace) -> int:
    targets = read_remap_to(args.remap_to or ["remain"])
    if not args.data.is_dir():
        raise FileNotFoundError(f"{args.data} is not a folder. `--data` is a folder with one folder of images per class.")

    from accelerate import PartialState
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import more_hf
    from more_hf.classification.image_folder import load_image_folder
    from more_hf.classification.labels import class_names

    state = PartialState()
    model = AutoModelForImageClassification.from_pretrained(args.model).to(state.device)
    processor = AutoImageProcessor.from_pretrained(args.model)
    names, channels = class_names(model, model.config.num_labels), getattr(model.config, "num_channels", 3)
    more_hf.erase_classes(
        model,
        load_image_folder(args.data, names, processor, channels=channels, batch_size=args.batch_size),
        args.forget,
        remap_to="remain" if targets == ["remain"] else targets,
        num_experts=args.num_experts,
        router=args.router,
        solver=args.solver,
        seed=args.seed,
    )
    if state.is_main_process:
        folder = more_hf.save(model, args.output, include_delta=args.include_delta)
        processor.save_pretrained(folder)
        print(more_hf.get_erasure(model).to_markdown())
        print(f"\nSaved to {args.output}. Check it with: more-hf verify {args.output}")
    return 0
