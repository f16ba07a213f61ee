"""Put the committed tables into the READMEs: `<!-- table: FILE N -->` is followed by the N-th table of that Markdown file.

python benchmarks/readme.py
"""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
READMES = (ROOT / "README.md", *(ROOT / "benchmarks" / name / "README.md" for name in ("artists", "emoji_sd", "geometry", "kd", "speed")))
MARKER = re.compile(r"(<!-- table: (\S+) (\d+) -->\n\n)((?:\|.*\n)*)")


def filled(text: str) -> str:
    """The text with every marked table as it stands in its file."""

    def table(match: re.Match) -> str:
        blocks = (ROOT / match[2]).read_text("utf-8").split("\n\n")
        tables = [block.strip() for block in blocks if block.startswith("|")]
        return f"{match[1]}{tables[int(match[3])]}\n"

    return MARKER.sub(table, text)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(filled(readme.read_text("utf-8")), "utf-8")
