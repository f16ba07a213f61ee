"""The measured pictures of `rows.csv`, and what the tables ask of them."""

from __future__ import annotations

import pandas as pd

from .config import ARTISTS, ArtistsConfig, artists_of


ORIGINAL = "original"  # in the column `method`: the pipeline without an edit
SEPARATOR = "; "  # between the names in `remap_to` and `retain`

# A row is one picture of an erased pipeline, next to the original's from the same noise.
COLUMNS = (
    "method",
    "forget",  # the erased names, joined by `+`, or the configuration's label for them
    "remap_to",  # the method's targets
    "retain",  # the names to keep; for a labelled set, their number
    "case_number",
    "sample",  # the number of the prompt's image, from 0
    "evaluation_seed",
    "artist",
    "thing",
    "group",
    "prompt",
    "lpips",  # the distance between the two pictures, at native size,
    "lpips_64",  # and resized to 64 pixels in two ways
    "lpips_64_rece",
    "style_before",  # the artist that the judge takes the picture for; empty without a judge
    "style_after",
    "content_before",  # whether (1, 0) the judge sees the prompt's thing
    "content_after",
    "seconds",  # for this picture
    "seconds_prepare",  # for the erasure
    "peak_memory",  # of the erasure, in MiB
    "before",  # the two picture files
    "after",
    "level",
)  # and with CLIP as a judge `clip_before` and `clip_after`, the scores of the content


def measured(rows: pd.DataFrame, config: ArtistsConfig | None = None) -> pd.DataFrame:
    """
    Add to the rows of a folder what the tables ask of them. Without the folder's configuration, they are
    about artists, and `forget` names them.

    `style_before`, `style_after`, `content_before` and `content_after` are 100 where the judge recognizes the
    row's artist or thing, else 0, and NaN if nobody judged; `gone_before` and so on are the one of the two
    that is forgotten, `kept_before` and so on the other. `concept` is the row's artist or thing, whichever
    the benchmark forgets, `names` what its erasure forgets, `is_forgotten` and `is_named` whether the concept
    is one of these, and whether it was passed to the method as a target or to keep.
    """
    kind = ARTISTS if config is None else config.of_kind
    rows = rows.assign(concept=rows[kind.one], level=rows.get("level", ""))
    for when in ("before", "after"):
        taken_for = rows[f"style_{when}"]
        rows[f"style_{when}"] = (100.0 * (taken_for == rows["artist"])).where(taken_for != "")
        rows[f"content_{when}"] *= 100.0
        rows[f"gone_{when}"] = rows[f"{kind.gone}_{when}"]
        rows[f"kept_{when}"] = rows[f"{kind.kept}_{when}"]
    names, named = {}, {}
    for forget, remap_to, retain in set(zip(rows["forget"], rows["remap_to"], rows["retain"], strict=True)):
        erasure = None if config is None else config.forget[forget]
        names[forget] = tuple(artists_of(forget) if erasure is None else erasure.forgotten(forget))
        kept = retain.split(SEPARATOR) if erasure is None else erasure.retain
        named[forget, remap_to, retain] = {*remap_to.split(SEPARATOR), *kept}
    rows["names"] = rows["forget"].map(names)
    keys = zip(rows["forget"], rows["remap_to"], rows["retain"], strict=True)
    rows["is_named"] = [name in named[key] for name, key in zip(rows["concept"], keys, strict=True)]
    rows["is_forgotten"] = [name in own for name, own in zip(rows["concept"], rows["names"], strict=True)]
    return rows
