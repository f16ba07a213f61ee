"""Imports point one way: from a room to those that CONTRIBUTING.md says it may import, and never up."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[2]
PACKAGES = {"more_hf": ROOT / "more_hf", "more_hf_bench": ROOT / "benchmarks" / "more_hf_bench"}
RULES = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
DRAWING = re.search(r"```text\n(bench.cli +->.*?)```", RULES, re.DOTALL)[1]
ALLOWED = {
    room.strip(): set(others.split()) for room, others in (line.split("->") for line in DRAWING.splitlines())
}


def room_of(parts):
    """The longest name in the drawing that is a beginning of a module's path."""
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in ALLOWED), "")


def modules():
    """Every file of both packages, with its module's name in parts; a room of the benchmarks is `bench.…`."""
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            yield file, (package, *file.relative_to(folder).with_suffix("").parts)


def in_drawing(parts):
    """A module's path as the drawing has it: `more_hf.core.remap` is `core.remap`."""
    return parts[1:] if parts[0] == "more_hf" else ("bench", *parts[1:])


def imported_rooms(file, parts):
    package = parts[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = (*start, *(node.module or "").split("."))
            modules = [".".join([*filter(None, module), alias.name]) for alias in node.names]
        else:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        paths = [name.split(".") for name in modules]
        yield from (room_of(in_drawing(path)) for path in paths if path[0] in PACKAGES)


def test_every_import_is_in_the_drawing():
    for file, parts in modules():
        room = room_of(in_drawing(parts))
        for other in set(imported_rooms(file, parts)) - {room, ""}:
            assert room == "" or other in ALLOWED[room], f"{file.relative_to(ROOT)} imports {other}"


def test_the_library_never_imports_the_benchmarks():
    for file, parts in modules():
        if parts[0] == "more_hf":
            text = file.read_text("utf-8")
            assert not re.search(r"(import|from) +more_hf_bench", text), file
            assert not any(room.startswith("bench") for room in imported_rooms(file, parts)), file


def test_no_arrow_points_up():
    rooms = list(ALLOWED)
    for room, others in ALLOWED.items():
        assert others <= set(rooms[rooms.index(room) + 1 :]), room


def outside(file):
    """The modules that a file imports and that neither are ours nor come with Python."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        names |= {module.split(".")[0] for module in modules}
    return names - set(sys.stdlib_module_names) - set(PACKAGES)


def test_core_imports_torch_and_safetensors_only():
    for file in (ROOT / "more_hf" / "core").rglob("*.py"):
        assert outside(file) <= {"torch", "safetensors"}, file


def installed_with(requirements):
    """Everything that an installer brings for these requirements."""
    found, left = set(), list(requirements)
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            left += requires(name) or []
    return found


def test_a_plain_installation_brings_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    plain = installed_with(project["dependencies"])
    bench = plain | installed_with(project["optional-dependencies"]["bench"])
    assert "gradio" not in bench  # of the extra for tests, which brings much else
    distributions = packages_distributions()
    for file, (package, *_) in modules():
        brought = bench if package == "more_hf_bench" else plain
        for module in outside(file) - {"peft", "bitsandbytes", "gguf"}:  # asked only where they are used
            assert {canonicalize_name(name) for name in distributions[module]} & brought, f"{file}: {module}"
