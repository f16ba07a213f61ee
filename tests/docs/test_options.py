"""An option of `erase_concept` is written once: its default in `ConceptRequest`, its meaning in its docs."""

import ast
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import more_hf
from more_hf.core.request import ConceptRequest


ROOT = Path(more_hf.__file__).parent
OPTIONS = {field.name: field.default for field in fields(ConceptRequest) if field.default is not MISSING}
ROOMS = ("core/request.py", "diffusion/*.py", "saving/*.py", "cli/erase.py", "cli/lora.py", "cli/request.py")


def defaults(tree):
    """Name and default of every parameter, keyword and field in a module that has one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            named, keyword = [*node.args.posonlyargs, *node.args.args], node.args.kwonlyargs
            pairs = list(zip(reversed(named), reversed(node.args.defaults), strict=False))
            pairs += zip(keyword, node.args.kw_defaults, strict=True)
            yield from ((part.arg, value) for part, value in pairs if value is not None)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield getattr(node.target, "id", ""), node.value
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            flag = str(node.args[0].value)
            yield from (
                (flag.removeprefix("--"), word.value) for word in node.keywords if word.arg == "default"
            )


def copies(source):
    """Options whose default stands in a module's source, other than `None`, which says nothing."""
    found = []
    for name, value in defaults(ast.parse(source)):
        same = isinstance(value, ast.Constant) and value.value == OPTIONS.get(name, ...)
        if same and value.value is not None:
            found.append(name)
    return found


def test_the_default_of_an_option_is_written_once():
    found = {}
    for room in ROOMS:
        for file in sorted(ROOT.glob(room)):
            for name in copies(file.read_text("utf-8")):
                found.setdefault(name, []).append(file.name)
    # `compare` numbers its pictures by a seed of its own, and a text has a pooled feature or not
    assert found.pop("seed") == ["request.py", "compare.py"]
    assert found.pop("pooled") == ["request.py", "text.py"]
    written = {name for name, default in OPTIONS.items() if default not in (None, ())}
    assert found == dict.fromkeys(written - {"seed", "pooled"}, ["request.py"])
    assert copies("def f(*, softness=1.0): add('--reach', default='name')") == ["softness", "reach"]


@pytest.mark.parametrize("name", ["erase_concept", "erase_to_lora", "erase_to_folder", "erase_file"])
def test_the_signature_shows_every_option(name):
    parameters = inspect.signature(getattr(more_hf, name)).parameters
    assert {option: parameters[option].default for option in OPTIONS} == OPTIONS
    assert parameters["remap_to"].default is inspect.Parameter.empty


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="softnes'"):
        more_hf.erase_concept(None, "cat", remap_to="dog", softnes=1)


def test_the_docstring_has_the_defaults():
    text = inspect.getdoc(more_hf.erase_concept)
    documented = dict(
        re.findall(r"^ *(\w+) \(.*\*optional\*(?:, defaults to `?(.+?)`?)?\):$", text, re.MULTILINE)
    )
    del documented["keep_originals"]
    research = {"templates", "everyday", "shrinkage", "pictures", "given"}
    assert documented.keys() == OPTIONS.keys() - research
    for name, default in documented.items():
        expected = None if OPTIONS[name] == () else OPTIONS[name]
        assert (ast.literal_eval(default) if default else None) == expected, name
