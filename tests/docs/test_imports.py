"""Imports point one way: from a room to those that CONTRIBUTING.md says it may import, and never up."""

import ast
import re
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
DRAWING = re.search(r"```text\n(cli +->.*?)```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)[1]
ALLOWED = {
    room.strip(): set(others.split()) for room, others in (line.split("->") for line in DRAWING.splitlines())
}


def room_of(parts):
    """The longest name in the drawing that is a beginning of a module's path."""
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), "")


def imported_rooms(file):
    package = ("more_hf", *file.relative_to(ROOT / "more_hf").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module or "").split("."))
            modules = [".".join([*filter(None, module), alias.name]) for alias in node.names]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (room_of(name.split(".")[1:]) for name in modules if name.startswith("more_hf."))


def test_every_import_is_in_the_drawing():
    for file in (ROOT / "more_hf").rglob("*.py"):
        room = room_of(file.relative_to(ROOT / "more_hf").with_suffix("").parts)
        for other in set(imported_rooms(file)) - {room, ""}:
            assert room == "" or other in ALLOWED[room], f"{file.relative_to(ROOT)} imports {other}"


def test_no_arrow_points_up():
    rooms = list(ALLOWED)
    for room, others in ALLOWED.items():
        assert others <= set(rooms[rooms.index(room) + 1 :]), room


def test_core_imports_torch_and_safetensors_only():
    outside = set()
    for file in (ROOT / "more_hf" / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            outside |= {module.split(".")[0] for module in modules}
    assert outside - set(sys.stdlib_module_names) <= {"torch", "safetensors"}
