"""Put the committed tables into the READMEs.

`<!-- table: FILE N -->` is followed by the N-th table of that Markdown file, and
`<!-- table: FILE N only A, B -->` by its rows A and B, in this order.

    python benchmarks/readme.py
"""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
READMES = [file for file in sorted(ROOT.glob("**/README.md")) if "<!-- table:" in file.read_text("utf-8")]
MARKER = re.compile(r"(<!-- table: (\S+) (\d+)(?: only (.+?))? -->\n\n)((?:\|.*\n)*)")


def filled(text: str) -> str:
    """The text with every marked table as it stands in its file."""

    def table(match: re.Match) -> str:
        marker, file, number, names, _ = match.groups()
        blocks = (ROOT / file).read_text("utf-8").split("\n\n")
        tables = [block.strip() for block in blocks if block.startswith("|")]
        lines = tables[int(number)].splitlines()
        if names is not None:
            rows = {line.split("|")[1].strip(): line for line in lines[2:]}
            lines = [*lines[:2], *(rows[name] for name in names.split(", "))]
        return marker + "\n".join(lines) + "\n"

    return MARKER.sub(table, text)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(filled(readme.read_text("utf-8")), "utf-8")
