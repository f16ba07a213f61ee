"""What an edit inside the denoiser costs the others, beside what a learned word still finds behind it.

    python benchmarks/attacks/pictures/price.py    # reach/price.csv, price.md, price.png

Reads what two benchmarks measured: the pictures of the others in `benchmarks/artists/reach` and
`reach-things`, and the words learned from pictures in `reach/softness` and `reach/things`. A line is one
method and one style or thing, the mean over runs of the attack.
"""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from more_hf.core.files import write_text
from more_hf.core.markdown import markdown_table
from more_hf_bench.columns import read_cells, write_rows
from more_hf_bench.figures import panels, write_figure
from more_hf_bench.script import argument_parser


HERE = Path(__file__).parent
ARTISTS = HERE.parents[1] / "artists"
MEASURED = {  # what the others pay -> what comes back
    ARTISTS / "reach": HERE / "reach" / "softness",
    ARTISTS / "reach-things": HERE / "reach" / "things",
}
METHODS = ("original", "more", "more-denoiser-soft", "more-denoiser", "more-denoiser-hard")
VARIANT = "1 token"


def prices(costs: list[dict[str, str]], attacks: list[dict[str, str]]) -> list[dict[str, str | float]]:
    """
    One line per style or thing and method that both files have.

    Args:
        costs (`list[dict[str, str]]`): lines of the artists' `summary.csv`.
        attacks (`list[dict[str, str]]`): lines of the attacks' `rows.csv`.
    """
    found = defaultdict(list)
    for row in attacks:
        if row["attack"] == "inversion" and row["variant"] == VARIANT:
            found[row["forget"], row["method"], row["budget"]].append(float(row["recovered"]))
    budgets = list(dict.fromkeys(budget for *_, budget in found))
    paid = {(row["forget"], row["method"]): row for row in costs}
    lines = []
    for forget in dict.fromkeys(forget for forget, *_ in found):
        for method in METHODS:
            if (forget, method) not in paid or (forget, method, budgets[0]) not in found:
                continue
            row = paid[forget, method]
            line = {"method": method, "forget": forget}
            for column in ("lpips_r", "lpips_none"):
                line[column] = round(float(row[column]), 3) if row[column] else None
            line["content_r"] = round(float(row["content_r"]), 1)
            for budget in budgets:
                line[f"after {budget} steps"] = round(fmean(found[forget, method, budget]), 1)
            lines.append(line)
    return lines


def price_figure(lines: list[dict[str, str | float]]):
    """One panel a name: what is found after the most steps, over how far the others' pictures moved."""
    styles = list(dict.fromkeys(line["forget"] for line in lines))
    figure, axes = panels(len(styles), width=2.8, height=2.4, legend=0.5, sharex=True, sharey=True)
    for style, panel in zip(styles, axes, strict=True):
        own = [line for line in lines if line["forget"] == style]
        found = [list(line.values())[-1] for line in own]
        panel.plot([line["lpips_r"] for line in own], found, color="lightgrey", zorder=1)
        for line, recognised in zip(own, found, strict=True):
            color = f"C{METHODS.index(line['method'])}"
            panel.scatter(line["lpips_r"], recognised, color=color, label=line["method"])
        panel.set_title(style, fontsize=9)
        panel.set_ylim(-5, 105)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(METHODS), fontsize=9)
    figure.supxlabel("how far the others' pictures moved (lpips_r)", fontsize=9)
    figure.supylabel("% recognised", fontsize=9)
    return figure


def main() -> None:
    argument_parser(__doc__).parse_args()
    lines = []
    for cost, attacks in MEASURED.items():
        lines += prices(read_cells(cost / "summary.csv"), read_cells(attacks / "rows.csv"))
    write_rows(HERE / "reach" / "price.csv", lines)
    table = markdown_table(lines)
    write_text(HERE / "reach" / "price.md", table + "\n")
    write_figure(HERE / "reach" / "price.png", price_figure(lines))
    print(table)


if __name__ == "__main__":
    main()
