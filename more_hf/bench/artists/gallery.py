"""The benchmark's page: methods as columns, prompts as rows, before and after, with filters and sorting; one file, no request."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ...core.markdown import number
from ..page import html_facts, html_table, write_html
from .store import ORIGINAL
from .summary import is_forgotten


BUDGET = 14_000_000  # bytes of pictures on the page
SIDE = 256  # larger pictures are shown at this size
SHOWN = ((20, 20), (20, 6), (20, 3), (10, 3), (10, 2), (5, 1), (2, 1))  # rows of the forgotten artist, of each other: the first that fits


def write_report(
    path: Path,
    images: Path,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    summary: Sequence[Mapping[str, Any]],
    table: Sequence[Mapping[str, Any]],
) -> None:
    """Write the page. Of each artist as many rows are shown as keep the pictures below `BUDGET`; the page says how many."""
    encoded = _Encoded(images)
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != ORIGINAL]
    lines = _lines(rows)
    for own, other in SHOWN:
        shown = _first(lines, own, other)
        if encoded.bytes_of(shown, methods) <= BUDGET:
            break
    generation = config["generation"]
    facts = {
        "model": config["model"],
        "weights": generation["weights"][:16],
        "generated with": f"{generation['scheduler']['class']}, {generation['steps']} steps, guidance {generation['guidance']:g}, "
        f"{generation['dtype']} on {generation['device']}",
        "prompts": f"{generation['prompts']}, sha256 {generation['prompts_sha256'][:16]}",
        "judges": config["judges"],
        "targets": [f"{name} → {', '.join(asked['remap_to'] or ['nothing'])}" for name, asked in config["forget"].items()],
        "commands": list(dict.fromkeys(run["command"] for run in config["runs"])),
    }
    write_html(
        path,
        title="Artists erased: before and after",
        intro=f"{len(lines)} prompts, each before and after every method, from the same noise. LPIPS is the distance between the two: "
        "large is meant for the forgotten artist, small for all others. Below each picture stands the artist that the judge takes it for.",
        sections={
            "Did it work?": re.sub(r"\*\*([^*<]+)\*\*", r"<b>\1</b>", html_table(table)),
            "How it was made": html_facts(facts),
            "Pictures": _controls(shown, methods)
            + f"<p>Shown: {len(shown)} of {len(lines)} rows; of each erasure at most {own} of the forgotten artist and {other} of each "
            "other. All numbers are in rows.csv, all pictures in the folder images.</p>"
            + _pictures(shown, methods, encoded),
        },
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line per erasure, prompt and seed, with the rows of every method; of each erasure the forgotten artist's first."""
    lines: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["forget"], row["case_number"], row["sample"]), {**row, "by": {}})
        line["by"][row["method"]] = row
    order = {forget: i for i, (forget, _, _) in enumerate(lines)}
    return sorted(lines.values(), key=lambda line: (order[line["forget"]], not is_forgotten(line)))


def _first(lines: Sequence[Mapping[str, Any]], own: int, other: int) -> list[Mapping[str, Any]]:
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for line in lines:
        key = (line["forget"], line["artist"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= (own if is_forgotten(line) else other):
            kept.append(line)
    return kept


class _Encoded:
    """Pictures as data URIs, each encoded once."""

    def __init__(self, folder: Path):
        self.folder, self.uris = folder, {}

    def __getitem__(self, name: str) -> str:
        if name not in self.uris:
            self.uris[name] = _data_uri(self.folder / name)
        return self.uris[name]

    def bytes_of(self, lines: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> int:
        """How large the lines' pictures are; an estimate from a few of them."""
        names = [name for line in lines for name in _names(line, methods)]
        some = names[:: max(1, len(names) // 50)]
        return sum(len(self[name]) for name in some) * len(names) // max(1, len(some))


def _names(line: Mapping[str, Any], methods: Sequence[str]) -> list[str]:
    return [line["before"], *(line["by"][method]["after"] for method in methods if method in line["by"])]


def _data_uri(path: Path) -> str:
    image = Image.open(path).convert("RGB")
    if max(image.size) <= 128:  # PNG keeps small pictures crisp, and is on the disk already
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "jpeg", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _controls(lines: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    erased = list(dict.fromkeys(line["forget"] for line in lines))
    artists = list(dict.fromkeys(line["artist"] for line in lines if line["artist"]))
    sorts = [("", "prompts")]
    for method in methods:
        sorts += [(f"{method}:d", f"LPIPS of {method}, largest first"), (f"{method}:a", f"LPIPS of {method}, smallest first")]
    asked = [("", "any"), ("forgotten", "the forgotten one"), *((name, name) for name in artists), ("none", "none")]
    return (
        f"<style>{_STYLE}</style><form id='controls' onsubmit='return false'>"
        + _select("forget", "Erased", [("", "any"), *((name, name) for name in erased)])
        + _select("artist", "Artist", asked)
        + _select("method", "Method", [("", "all"), *((name, name) for name in methods)])
        + _select("sort", "Order", sorts)
        + "<label>Prompt <input id='text' type='search' autocomplete='off'></label><output id='rows'></output></form>"
    )


def _select(name: str, label: str, options: Sequence[tuple[str, str]]) -> str:
    choices = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<label>{label} <select id="{name}">{choices}</select></label>'


def _pictures(lines: Sequence[Mapping[str, Any]], methods: Sequence[str], encoded: _Encoded) -> str:
    head = "".join(f'<th data-method="{escape(method)}">{escape(method)}</th>' for method in methods)
    body = "".join(_row(line, methods, encoded) for line in lines)
    return (
        f'<div class="scroll"><table id="pictures"><thead><tr><th>prompt</th><th>before</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div><script>{_SCRIPT}</script>"
    )


def _row(line: Mapping[str, Any], methods: Sequence[str], encoded: _Encoded) -> str:
    prompt = escape(line["prompt"])
    cells = [
        f"<td class='prompt'>{prompt}<small>{escape(line['forget'])} erased; seed {line['evaluation_seed']}</small></td>",
        _cell(encoded[line["before"]], f"before: {prompt}", _judged(line["style_before"], line["content_before"])),
    ]
    for method in methods:
        row = line["by"].get(method)
        if row is None:
            cells.append(f'<td data-method="{escape(method)}"></td>')
            continue
        note = f"LPIPS {number(row['lpips'])}{_judged(row['style_after'], row['content_after'], ', ')}"
        cells.append(_cell(encoded[row["after"]], f"{escape(method)}: {prompt}", note, method, row["lpips"]))
    forgotten = str(is_forgotten(line)).lower()
    return (
        f'<tr data-forget="{escape(line["forget"])}" data-artist="{escape(line["artist"])}" data-forgotten="{forgotten}" '
        f'data-prompt="{escape(line["prompt"].lower())}">{"".join(cells)}</tr>'
    )


def _judged(style: str, content: int | None, before: str = "") -> str:
    found = [escape(style)] if style else []
    found += [] if content is None else ["thing seen" if content else "thing not seen"]
    return before + ", ".join(found) if found else ""


def _cell(uri: str, alt: str, note: str, method: str | None = None, lpips: float | None = None) -> str:
    data = "" if method is None else f' data-method="{escape(method)}" data-lpips="{lpips}"'
    return f'<td{data}><img src="{uri}" alt="{alt}"><small>{note}</small></td>'


_STYLE = """
#controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; margin-bottom: 1rem; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem;
  padding: .35rem .5rem; }
#controls input { width: 12rem; } #rows { color: var(--soft); align-self: center; }
#pictures td { vertical-align: top; } #pictures img { display: block; width: 8rem; background: #fff; border-radius: .4rem; }
#pictures small { display: block; color: var(--soft); max-width: 9rem; white-space: normal; }
#pictures .prompt { white-space: normal; min-width: 11rem; }
#pictures [hidden] { display: none; }
"""

_SCRIPT = """
const table = document.getElementById("pictures"), body = table.tBodies[0], all = [...body.rows];
const value = id => document.getElementById(id).value;
const lpips = (row, method) => {
  for (const cell of row.cells) if (cell.dataset.method === method && cell.dataset.lpips) return Number(cell.dataset.lpips);
  return NaN;
};
function show() {
  const words = value("text").toLowerCase().split(/\\s+/).filter(Boolean), artist = value("artist"), forget = value("forget");
  let shown = 0;
  for (const row of all) {
    const data = row.dataset;
    const fits = artist === "" || (artist === "forgotten" ? data.forgotten === "true" : data.artist === (artist === "none" ? "" : artist));
    row.hidden = !(fits && (forget === "" || data.forget === forget) && words.every(word => data.prompt.includes(word)));
    shown += !row.hidden;
  }
  const method = value("method");
  for (const cell of table.querySelectorAll("[data-method]")) cell.hidden = method !== "" && cell.dataset.method !== method;
  document.getElementById("rows").textContent = `${shown} of ${all.length} rows`;
}
function sort() {
  const order = value("sort"), cut = order.lastIndexOf(":"), method = order.slice(0, cut), sign = order.endsWith("d") ? -1 : 1;
  const key = row => { const x = lpips(row, method); return Number.isNaN(x) ? Infinity : sign * x; };
  const rows = order === "" ? all : [...all].sort((a, b) => key(a) - key(b));
  body.append(...rows);
}
for (const id of ["forget", "artist", "method", "text"]) document.getElementById(id).addEventListener("input", show);
document.getElementById("sort").addEventListener("input", sort);
show();
"""
