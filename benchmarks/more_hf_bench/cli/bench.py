"""`more-hf bench`: the benchmarks."""

from more_hf.cli.options import add_command

from . import artists, attacks, classes, report


def add_to(commands) -> None:
    """Add it, with its own sub-commands, to the parser's sub-commands."""
    parser = add_command(
        commands,
        "bench",
        None,
        purpose="measure what erasing does to pictures, and to classifiers",
        examples=(
            "more-hf bench artists --forget Blobmoji --limit 4 --output DIR",
            "more-hf bench kd --forget 3 --output DIR",
        ),
    )
    benches = parser.add_subparsers(metavar="benchmark", required=True)
    for module in (artists, classes, attacks, report):
        module.add_to(benches)
