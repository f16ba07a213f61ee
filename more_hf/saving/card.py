"""The model card of something erased: what was erased, what that is and is not, how to load it, under the original's licence."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from huggingface_hub import ModelCard

from ..classification.erasure import ClassErasure
from ..core.facts import Facts
from ..core.markdown import markdown_table
from ..core.record import Record
from ..diffusion.erasure import ConceptErasure


START, END = "<!-- more_hf: every push writes this section again -->", "<!-- more_hf: end of the section -->"
TAGS = ("more-hf", "concept-erasure", "machine-unlearning")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TASK = {"diffusers": "text-to-image", "transformers": "image-classification"}
LOAD = {
    "diffusers": "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({})",
    "transformers": "from transformers import AutoModelForImageClassification\n\n"
    "model = AutoModelForImageClassification.from_pretrained({})",
}
EXACT = {
    "diffusers": "- Exact to rounding: the mean features of prompts that name what was erased now give what those of the target give. "
    "This was checked on these files, layer by layer, before they were uploaded.\n"
    "- Not exact: a single prompt moves by as much of that mean as it contains. A paraphrase without the name can keep some of the "
    "concept, and a prompt close to it can lose some of its own.",
    "transformers": "- Exact to rounding: the mean feature of every forgotten class now gets the scores of its target. These files were "
    "checked before they were uploaded.\n"
    "- Not exact: a single image moves by as much of that mean as it contains.\n"
    "- The backbone is untouched: its features are the original's, and a new head on them can tell the classes apart again.",
}


def make_card(
    record: Record,
    repo_id: str,
    *,
    base: ModelCard | None = None,
    existing: ModelCard | None = None,
    grid: str | None = None,
    with_delta: bool = False,
) -> str:
    """Write the card of an erased pipeline or classifier, or put its section into a card that exists; what else that card says is kept.

    Args:
        record: the content of `more_hf.json`.
        repo_id (`str`): where the model will be.
        base (`ModelCard`, *optional*): the original model's card, whose licence, language and tags are carried over.
        existing (`ModelCard`, *optional*): the card to extend. It is changed.
        grid (`str`, *optional*): the file name of a picture of before and after.
        with_delta (`bool`, defaults to `False`): whether the factors of the edit lie beside the weights.

    Example:

        >>> import more_hf
        >>> from more_hf.core.record import Record
        >>> from more_hf.saving.card import make_card
        >>> pipe = more_hf.erase_concept(more_hf.load_emoji_sd(), "Blobmoji", remap_to=["Fluent"])
        >>> record = Record.read(more_hf.save(pipe, "without-blobmoji"))
        >>> print(make_card(record, "me/emoji-sd-without-blobmoji"))
    """
    library = "transformers" if record.kind == "classifier" else "diffusers"
    card = existing or ModelCard(f"---\nlibrary_name: {library}\n---\n\n# {repo_id.split('/')[-1]}\n")
    _carry_over(card.data, base.data if base else None, record.facts, library)
    section = f"{START}\n{_section(record, repo_id, card.data, library, grid, with_delta)}\n{END}"
    earlier = re.search(f"{re.escape(START)}.*?{re.escape(END)}", card.text, re.DOTALL)
    card.text = card.text.replace(earlier[0], section) if earlier else f"{card.text.rstrip()}\n\n{section}\n"
    return str(card)


def _carry_over(data, base, facts: Facts, library: str) -> None:
    """Fill in what the card does not say yet."""
    model = facts.base if HUB_ID.fullmatch(facts.base) else None
    if data.base_model is None and model is not None:
        data.base_model, data.base_model_relation = model, "finetune"
    if base is not None and data.license is None:
        data.license, data.license_name, data.license_link = base.license, base.license_name, base.license_link
        if data.license_link and model and "://" not in data.license_link:
            data.license_link = f"https://huggingface.co/{model}/blob/{facts.base_revision or 'main'}/{data.license_link}"
    data.library_name = data.library_name or library
    data.pipeline_tag = data.pipeline_tag or (base and base.pipeline_tag) or TASK[library]
    data.language = data.language or (base and base.language)
    data.tags = list(dict.fromkeys([*(data.tags or []), *(base and base.tags or []), *TAGS]))


def _section(record: Record, repo_id: str, data, library: str, grid: str | None, with_delta: bool) -> str:
    request, facts = record.request, record.facts
    names = " and ".join(f"**{_text(name)}**" for name in request.concepts)
    model = facts.base or "the original model"
    if HUB_ID.fullmatch(model):
        at = f" (revision `{facts.base_revision}`)" if facts.base_revision else ""
        model = f"[{model}](https://huggingface.co/{model}){at}"
    source = f'"{repo_id}"' + (f', variant="{record.variant}"' if record.variant else "")
    kind = ConceptErasure if library == "diffusers" else ClassErasure
    erasure = kind(request, facts, record.sites, {}, None, record.guarantees, record.proof)
    parts = [
        "## What was erased",
        f"This is {model} without {names}, edited by more_hf {record.more_hf} in closed form, without training.",
        f"![The same prompts and seeds before and after]({grid})" if grid else "",
        "## How to load it",
        f"```python\n{LOAD[library].format(source)}\n```",
        "Nothing else is needed: the edit is in the weights. `more_hf.load` opens it with the record of what was done, "
        "and `more-hf verify` checks a downloaded folder against it.",
        "## What the edit is, and what it is not",
        f"- {len(record.sites)} layer(s) differ from the original, each by a matrix of rank {facts.rank}. The edit touches nothing "
        f"else, and all names and shapes are the original's.\n{EXACT[library]}\n"
        "- The weights tell what was erased: its direction is the one that the edited layers no longer see, and the difference to the "
        "public original is the edit. Whoever has the original has the concept, and training can teach it again."
        + ("\n- The factors of the edit lie beside the weights: with both, the original can be computed." if with_delta else "")
        + (f"\n- {_router(request.router, with_delta)}" if request.router else ""),
        _licence(data),
        "## What was done and measured",
        escape(erasure.to_markdown(), quote=False),
        _results(facts.benchmark) if facts.benchmark else "",
    ]
    return "\n\n".join(filter(None, parts))


def _results(rows: list[dict[str, Any]]) -> str:
    """The table without the ends of intervals, which are in the record."""
    return markdown_table(rows, [column for column in rows[0] if not column.endswith(("_low", "_high"))])


def _router(name: str, with_delta: bool) -> str:
    where = "is put back by `more_hf.load`" if with_delta else "is not here"
    return f"The weights hold the mean of all experts. The `{name}` router, which picks one at run time, {where}."


def _licence(data) -> str:
    if data.license is None:
        return ""
    name = data.license_name or data.license
    return (
        f"The original's licence, {f'[{name}]({data.license_link})' if data.license_link else f'`{name}`'}, holds for this derivative "
        "with all its conditions, restrictions on use included."
    )


def _text(name: str) -> str:
    """A name as plain text: no markup, no line breaks, no end of the section."""
    return re.sub(r"([\\`*_\[\]])", r"\\\1", escape(" ".join(name.split()), quote=False))
