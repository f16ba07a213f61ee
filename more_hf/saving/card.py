"""Write the model card: what was erased, what the edit does and does not do, how to load it, the license."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..classification.accuracies import Accuracies
from ..classification.erasure import ClassErasure
from ..classification.kinds import IMAGES, Kind, find_kind
from ..core.erasure import Erasure
from ..core.facts import ClassFacts, Facts
from ..core.markdown import bare_table, markdown_table
from ..core.record import Record
from ..diffusion.erasure import ConceptErasure
from .check import checked_before_upload


START = "<!-- more_hf: every push writes this section again -->"
END = "<!-- more_hf: end of the section -->"
TAGS = ("more-hf", "concept-erasure", "machine-unlearning")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
URL = re.compile(r"https?://[\w.~/%#?=&+:@-]+", re.ASCII)
LIBRARY = {"pipeline": "diffusers", "classifier": "transformers"}

# Characters with a meaning in Markdown: emphasis, code and links.
SPECIAL = re.compile(r"[\\`*\[\]~]|(?<!\w)_|_(?!\w)")


def make_card(
    record: Record,
    repo_id: str,
    *,
    base: ModelCard | None = None,
    existing: ModelCard | None = None,
    picture: str | None = None,
    with_delta: bool = False,
) -> str:
    """
    Write the card of an erased model, or its section in the `existing` card, which is modified and whose rest
    is kept.

    The license, language and tags of the original's card, `base`, are carried over. `picture` is the file
    name of a picture of before and after; `with_delta` says whether the factors of the edit are published
    with the weights.

    Example:

    ```py
    >>> import more_hf
    >>> from more_hf.core.record import Record
    >>> from more_hf.saving.card import make_card

    >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
    >>> record = Record.read(more_hf.save(pipe, "without-blobmoji"))
    >>> print(make_card(record, "me/emoji-sd-without-blobmoji"))
    ```
    """
    title = repo_id.split("/")[-1]
    card = existing or ModelCard(f"---\nlibrary_name: {LIBRARY[record.kind]}\n---\n\n# {title}\n")
    _carry_over(card.data, None if base is None else base.data, record)
    section = f"{START}\n{_section(record, repo_id, card.data, picture, with_delta)}\n{END}"
    earlier = re.search(f"{re.escape(START)}.*?{re.escape(END)}", card.text, re.DOTALL)
    if earlier:
        card.text = card.text.replace(earlier[0], section)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    return str(card)


def escape(value: object) -> object:
    """
    Escape text so that Markdown and HTML show it literally, on one line; `Markup` and numbers stay.

    The whole card goes through here, because names, targets and results may come from anybody's record.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = html.escape(" ".join(value.split()), quote=False)
    return Markup(SPECIAL.sub(r"\\\g<0>", line))


def _carry_over(data: ModelCardData, base: ModelCardData | None, record: Record) -> None:
    """Fill in the card's missing metadata."""
    facts = record.facts
    model = facts.base if HUB_ID.fullmatch(facts.base) else None
    if data.base_model is None and model is not None:
        data.base_model, data.base_model_relation = model, "finetune"
    if base is not None and data.license is None:
        data.license, data.license_name = base.license, base.license_name
        data.license_link = base.license_link
        if data.license_link and model and "://" not in data.license_link:
            revision = facts.base_revision or "main"
            data.license_link = f"https://huggingface.co/{model}/blob/{revision}/{data.license_link}"
    data.library_name = data.library_name or LIBRARY[record.kind]
    data.pipeline_tag = data.pipeline_tag or (base and base.pipeline_tag)
    if data.pipeline_tag is None:
        data.pipeline_tag = _kind(facts).task if record.kind == "classifier" else "text-to-image"
    data.language = data.language or (base and base.language)
    data.tags = list(dict.fromkeys([*(data.tags or []), *(base and base.tags or []), *TAGS]))


def _section(record: Record, repo_id: str, data: ModelCardData, picture: str | None, with_delta: bool) -> str:
    request, facts, erasure = record.request, record.facts, _erasure(record, with_delta)
    own_class = record.kind == "pipeline" and not hasattr(diffusers, facts.pipeline)
    measured = getattr(facts, "accuracy", None)  # of a classifier
    environment = Environment(
        finalize=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8"))
    variant = f', variant="{record.variant}"' if record.variant else ""
    return template.render(
        model=_model(facts),
        names=list(request.concepts),
        version=record.more_hf,
        picture=picture and Markup(picture),  # named by `push_to_hub`
        opener=_kind(facts).auto.__name__ if record.kind == "classifier" else None,
        own_class=own_class,
        pipeline=facts.pipeline if own_class else "DiffusionPipeline",
        source=Markup(f'"{repo_id}"{variant}'),  # both were checked
        layers=len(record.sites),
        rank=facts.rank,
        with_delta=with_delta,
        router=request.router,
        license=_license(data),
        claims=list(erasure.claims()),
        checked=checked_before_upload(record),
        report=Markup(bare_table((escape(name), escape(finding)) for name, finding in erasure.rows())),
        accuracy=measured and Markup(_accuracies(measured, request.concepts)),
        measured_on=measured and facts.measured_on,
        study=Markup(_study(facts)),
        judged=getattr(facts, "judged", ""),
        explained=Markup(erasure.explain()),
    )


def _accuracies(accuracy: Mapping[str, Mapping[str, float]], forgotten: Collection[str]) -> str:
    """The table of every class's accuracy."""
    found = Accuracies.from_facts(accuracy, forgotten)
    return Accuracies(tuple(replace(one, name=escape(one.name)) for one in found.classes)).to_markdown()


def _study(facts: Facts) -> str:
    """The table of the edits that `tune` gave to choose from; empty if the erasure is not from a study."""
    rows = getattr(facts, "study", None)
    if not rows:
        return ""
    columns = {escape(column): column for column in rows[0]}
    lines = [{shown: escape(row.get(column, "")) for shown, column in columns.items()} for row in rows]
    return markdown_table(lines)


def _model(facts: Facts) -> str:
    """The original's name, with a link and the commit if it came from the Hub."""
    if not HUB_ID.fullmatch(facts.base):
        return facts.base or "the original model"
    revision = f" (revision `{facts.base_revision}`)" if facts.base_revision else ""
    return Markup(f"[{facts.base}](https://huggingface.co/{facts.base}){revision}")


def _kind(facts: ClassFacts) -> Kind:
    """What a classifier tells apart."""
    return find_kind(facts.model) or IMAGES


def _license(data: ModelCardData) -> str | None:
    if data.license is None:
        return None
    name = escape(str(data.license_name or data.license))
    if data.license_link and URL.fullmatch(str(data.license_link)):
        return Markup(f"[{name}]({data.license_link})")
    return name


def _erasure(record: Record, with_delta: bool) -> Erasure:
    """The record as an erasure that can be reported: without the factors, there is no router."""
    kind = ClassErasure if record.kind == "classifier" else ConceptErasure
    request = record.request if with_delta else replace(record.request, router=None)
    # The report needs only the number of layers, so the record's shapes can stand for them.
    return kind(request, record.facts, record.sites, {}, None, record.guarantees, record.proof)
