"""Arguments that several commands take, and how their values are read."""

import argparse
import difflib

from more_hf.data import EMOJI_ARTISTS


EMOJI_SD = "emoji-sd"
TOKENS = ("subject", "end", "subject+end", "positions", "last")


def add_remap_to(parser: argparse.ArgumentParser, *, note: str = "", **options) -> None:
    parser.add_argument(
        "--remap_to",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"what the concepts are sent to; none erases without remapping{note}",
        **options,
    )


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def read_remap_to(names: list[str]) -> list[str] | None:
    none = [name for name in names if name.casefold() == "none"]
    if none and len(names) > 1:
        raise ValueError(f"`--remap_to` has {none[0]!r} beside other names; pass names, or none alone.")
    return None if none else names


def emoji_artist(name: str) -> str:
    """The embedded pipeline's spelling of an artist's name."""
    for artist in EMOJI_ARTISTS:
        if artist.casefold() == name.casefold():
            return artist
    raise ValueError(f"The embedded pipeline has no artist {name!r}.{_did_you_mean(name)} Available: {', '.join(EMOJI_ARTISTS)}.")


def refuse_typo(name: str) -> None:
    """Things can be erased from the embedded pipeline as well, so only a name just beside an artist's is refused."""
    if name.casefold() not in {artist.casefold() for artist in EMOJI_ARTISTS} and (hint := _did_you_mean(name, 0.8)):
        raise ValueError(f"The embedded pipeline has no artist {name!r}.{hint}")


def _did_you_mean(name: str, cutoff: float = 0.6) -> str:
    spelling = {artist.casefold(): artist for artist in EMOJI_ARTISTS}
    close = difflib.get_close_matches(name.casefold(), spelling, n=1, cutoff=cutoff)
    return f" Did you mean {spelling[close[0]]!r}?" if close else ""
