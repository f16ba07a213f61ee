"""Rows to CSV, to a Markdown table, and to one self-contained HTML page with pictures side by side."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from ..core.files import write_text
from ..core.markdown import is_numeric, number, table_columns


@dataclass(frozen=True)
class Pair:
    """
    One prompt before and after an edit.

    Args:
        before (`PIL.Image.Image`):
            What the original model draws.
        after (`PIL.Image.Image`):
            What the edited model draws from the same noise.
        prompt (`str`):
            The prompt of both.
        lpips (`float`):
            Their distance.
    """

    before: Image.Image
    after: Image.Image
    prompt: str
    lpips: float


def html_facts(facts: Mapping[str, object]) -> str:
    """Format names and values as a list of facts. Lists are joined with commas; nested mappings are flattened."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(facts))
    return f"<dl>{items}</dl>"


def html_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Format rows as an HTML table; arguments as in `markdown_table`."""
    columns = table_columns(rows, columns)
    kind = {column: ' class="num"' if is_numeric(rows, column) else "" for column in columns}
    head = "".join(f"<th{kind[column]}>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td{kind[c]}>{escape(number(row.get(c)))}</td>" for c in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_pairs(pairs: Sequence[Pair]) -> str:
    """Lay pairs out as cards: before and after side by side, the prompt and LPIPS below."""
    return f'<div class="pairs">{"".join(map(_card, pairs))}</div>'


def write_html(path: str | Path, *, title: str, intro: str, sections: Mapping[str, str]) -> None:
    """
    Write a page that needs no other file and makes no request, for light and dark screens, wide and narrow.

    Args:
        path (`str` or `Path`):
            The file to write.
        title (`str`):
            Title and heading.
        intro (`str`):
            A paragraph below the heading.
        sections (`Mapping[str, str]`):
            Heading to what `html_facts`, `html_table` and `html_pairs` returned; several may be joined. Titles,
            headings and the intro are escaped here, cells and prompts were escaped there.
    """
    body = "".join(f"<section><h2>{escape(heading)}</h2>{part}</section>" for heading, part in sections.items())
    page = _PAGE.format(title=escape(title), intro=escape(intro), style=_STYLE, script=_SCRIPT, body=body)
    write_text(path, page)


def _flat(facts: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    items = []
    for name, value in facts.items():
        name = f"{prefix}{name}"
        if isinstance(value, Mapping):
            items += _flat(value, f"{name} · ")
        elif isinstance(value, list | tuple):
            items.append((name, ", ".join(map(number, value)) or "none"))
        else:
            items.append((name, "none" if value is None else number(value)))
    return items


def _card(pair: Pair) -> str:
    prompt = escape(pair.prompt, quote=True)
    pictures = "".join(
        f'<span><img loading="lazy" src="{_data_uri(image)}" alt="{name}: {prompt}"><small>{name}</small></span>'
        for name, image in (("before", pair.before), ("after", pair.after))
    )
    return (
        f'<figure data-prompt="{prompt.lower()}"><div class="two">{pictures}</div>'
        f"<figcaption>{prompt}<b>LPIPS {number(pair.lpips)}</b></figcaption></figure>"
    )


def _data_uri(image: Image.Image) -> str:
    # PNG keeps small pictures crisp; at 512 pixels it would make a page of hundreds of megabytes.
    kind, options = ("png", {"optimize": True}) if max(image.size) <= 128 else ("jpeg", {"quality": 92})
    data = io.BytesIO()
    image.convert("RGB").save(data, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{intro}</p>
<label hidden>Show prompts with <input id="filter" type="search" placeholder="a thing or a style" autocomplete="off">
<output id="count" for="filter"></output></label></header>
<main>{body}</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1d1d1f; --soft: #6b6b70; --rule: #e2e2de;
  --mark: #2f5fd0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #151517; --card: #1f1f23; --ink: #ececee; --soft: #9c9ca4; --rule: #34343a; --mark: #8fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .8rem; }
header p { margin: 0 0 1.2rem; color: var(--soft); max-width: 60rem; }
label { color: var(--soft); }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .35rem .7rem; width: min(20rem, 100%); }
input:focus-visible { outline: 2px solid var(--mark); border-color: transparent; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .35rem 1.25rem; margin: 0 0 1rem;
  background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; padding: 1rem 1.25rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-bottom: 1rem; border: 1px solid var(--rule); border-radius: .75rem;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .5rem .9rem; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } tr:last-child td { border-bottom: 0; }
.num { text-align: right; font-variant-numeric: tabular-nums; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: .75rem; overflow: hidden; }
figure[hidden] { display: none; }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.two span { position: relative; }
.two img { display: block; width: 100%; background: #fff; }
.two small { position: absolute; left: .4rem; bottom: .35rem; padding: 0 .4rem; border-radius: .4rem; font-size: .7rem;
  background: rgb(255 255 255 / .85); color: #333; }
figcaption { padding: .6rem .8rem; font-size: .88rem; }
figcaption b { display: block; font-weight: 500; color: var(--soft); font-variant-numeric: tabular-nums; }
main { padding-bottom: 4rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; } }
"""

_SCRIPT = """
const cards = [...document.querySelectorAll("figure")], box = document.getElementById("filter");
box.parentElement.hidden = !cards.length;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const card of cards) card.hidden = !words.every(word => card.dataset.prompt.includes(word));
  const shown = cards.filter(card => !card.hidden).length;
  document.getElementById("count").textContent = words.length ? `${shown} of ${cards.length}` : "";
});
"""
