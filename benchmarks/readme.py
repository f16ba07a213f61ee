"""Put the committed tables, and the table of what can be edited, into the READMEs.

`<!-- table: FILE N -->` is followed by the N-th table of that Markdown file,
`<!-- table: FILE N only A, B -->` by its rows A and B, in this order, and
`<!-- table: FILE N columns x, y -->` by its first column and the columns x and y;
both may be given, in this order.
`<!-- table: families -->` is followed by the families of denoisers that the package knows.

    python benchmarks/readme.py
"""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
READMES = [file for file in sorted(ROOT.glob("**/README.md")) if "<!-- table:" in file.read_text("utf-8")]
FAMILIES_MARKER = re.compile(r"(<!-- table: families -->\n\n)((?:\|.*\n)*)")
HEAD = """\
| family | merge | router | LoRA, peft | LoRA, kohya | LoRA, comfyui | push, load |
|---|:-:|:-:|:-:|:-:|:-:|:-:|
"""
# What is no family: classifiers, and weights that are not a folder in 16 or 32 bits.
QUANTIZED, ONE_FILE = (f"(examples/README.md#{heading})" for heading in ("quantized-weights", "one-file"))
OTHERS = {
    "classifiers of transformers and timm: images, video, sound, text": "✓ | ✓ | | | | ✓",
    f"[quantized]{QUANTIZED}: bitsandbytes, torchao, quanto, fp8 casting": "✓ | | ✓ | | | ✓",
    f"[one file]{ONE_FILE}: `.safetensors`, or `.gguf` with plain text layers": "✓ | refused | ✓ | | ✓ |",
    "one file in fp8, or `.gguf` with quantized text layers": "refused | refused | ✓ | | ✓ |",
}
MARKER = re.compile(r"(<!-- table: (\S+) (\d+)(?: only (.+?))?(?: columns (.+?))? -->\n\n)((?:\|.*\n)*)\n?")


def families_table() -> str:
    """The families in the registry's order; those that LoRA files support alike share a row."""
    from more_hf.diffusion.families import FAMILIES

    rows: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        reads = family.lora, family.kohya is not None, bool(family.original) or family.kohya is not None
        marks = " | ".join("✓" if read else "refused" for read in reads)
        rows.setdefault(f"✓ | ✓ | {marks} | ✓ |", []).append(family.name)
    lines = [f"| {', '.join(names)} | {marks}\n" for marks, names in rows.items()]
    lines += [f"| {name} | {marks} |\n" for name, marks in OTHERS.items()]
    return HEAD + "".join(lines)


def filled(text: str) -> str:
    """The text with every marked table as its file has it."""

    def table(match: re.Match) -> str:
        marker, file, number, names, columns, _ = match.groups()
        blocks = (ROOT / file).read_text("utf-8").split("\n\n")
        tables = [block.strip() for block in blocks if block.startswith("|")]
        lines = tables[int(number)].splitlines()
        if names is not None:
            rows = {line.split("|")[1].strip(): line for line in lines[2:]}
            lines = [*lines[:2], *(rows[name] for name in names.split(", "))]
        if columns is not None:
            cells = [line.split("|")[1:-1] for line in lines]
            heads = [cell.strip() for cell in cells[0]]
            kept = [0, *(heads.index(name) for name in columns.split(", "))]
            lines = ["|".join(["", *(row[i] for i in kept), ""]) for row in cells]
        return marker + "\n".join(lines) + "\n\n"

    text = FAMILIES_MARKER.sub(lambda match: match.group(1) + families_table(), text)
    return MARKER.sub(table, text)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(filled(readme.read_text("utf-8")), "utf-8")
