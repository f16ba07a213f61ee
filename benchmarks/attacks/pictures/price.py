"""What an edit inside the denoiser costs the others, beside what a learned word still finds behind it.

    python benchmarks/attacks/pictures/price.py    # reach/price.csv, price.md, price.png

Reads what two benchmarks measured: the pictures of the others in `benchmarks/artists/reach`, and the words
learned from pictures in `reach/softness`. A line is one method and one style.
"""

import argparse
from pathlib import Path

from more_hf.bench.columns import read_cells, write_rows
from more_hf.bench.figures import panels, write_figure
from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table


HERE = Path(__file__).parent
COSTS = HERE.parents[1] / "artists" / "reach"
METHODS = ("original", "more", "more-denoiser-soft", "more-denoiser", "more-denoiser-hard")
VARIANT = "1 token"


def prices(costs: list[dict[str, str]], attacks: list[dict[str, str]]) -> list[dict[str, str | float]]:
    """
    One line per method and style that both files have.

    Args:
        costs (`list[dict[str, str]]`): lines of the artists' `summary.csv`.
        attacks (`list[dict[str, str]]`): lines of the attacks' `rows.csv`.
    """
    found = {
        (row["method"], row["forget"], row["budget"]): float(row["recovered"])
        for row in attacks
        if row["attack"] == "inversion" and row["variant"] == VARIANT
    }
    budgets = list(dict.fromkeys(budget for *_, budget in found))
    lines = []
    for method in METHODS:
        for row in costs:
            key = method, row["forget"]
            if row["method"] != method or (*key, budgets[0]) not in found:
                continue
            line = {"method": method, "forget": row["forget"]}
            line |= {column: round(float(row[column]), 3) for column in ("lpips_r", "lpips_none")}
            line["content_r"] = round(float(row["content_r"]), 1)
            line |= {f"after {budget} steps": found[*key, budget] for budget in budgets}
            lines.append(line)
    return lines


def price_figure(lines: list[dict[str, str | float]]):
    """One panel a style: what is found after the most steps, over how far the others' pictures moved."""
    styles = list(dict.fromkeys(line["forget"] for line in lines))
    figure, axes = panels(len(styles), width=3.3, height=2.8, sharey=True)
    for style, panel in zip(styles, axes, strict=True):
        own = [line for line in lines if line["forget"] == style]
        found = [list(line.values())[-1] for line in own]
        panel.plot([line["lpips_r"] for line in own], found, marker="o", linewidth=1)
        for line, recognised in zip(own, found, strict=True):
            panel.annotate(line["method"], (line["lpips_r"], recognised), fontsize=6, rotation=15)
        panel.set_title(style, fontsize=9)
        panel.set_ylim(0, 105)
        panel.margins(x=0.25)  # room for the names
    figure.supxlabel("how far the others' pictures moved (lpips_r)", fontsize=9)
    figure.supylabel("% of the style recognised", fontsize=9)
    return figure


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    attacks = read_cells(HERE / "reach" / "softness" / "rows.csv")
    lines = prices(read_cells(COSTS / "summary.csv"), attacks)
    write_rows(HERE / "reach" / "price.csv", lines)
    table = markdown_table(lines)
    write_text(HERE / "reach" / "price.md", table + "\n")
    write_figure(HERE / "reach" / "price.png", price_figure(lines))
    print(table)


if __name__ == "__main__":
    main()
