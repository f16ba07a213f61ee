"""Every error that the package raises states a fact and a next step, as far as its source can tell."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import more_hf
import more_hf_bench


PACKAGES = [Path(package.__file__).parent for package in (more_hf, more_hf_bench)]
# What a sentence, or a part of one, begins with when it says what to do.
STEPS = set(
    "add ask build call charge check choose collect copy correct define delete describe drop erase feed "
    "forget free fuse generate give import install join judge leave let load make name open pass point push "
    "put raise register remove restore run save see set start take train try undo use wait write".split()
)
# A message may instead say what is accepted, or ask for what is the likely cause.
ACCEPTED = re.compile(r"\b(must|needs?|takes?|there are|its \S+ are|it has|at least|erased:) |\?")


def errors_of(trees):
    """Names of `MoreError` and all that is derived from it in the package."""
    found, bases = {"MoreError"}, {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split(".")[-1] for base in node.bases}
    while more := {name for name in bases if name not in found and bases[name] & found}:
        found |= more
    return found


def texts_of(node, assigned):
    """Every text that an expression may be, with `{}` for what is filled in; names are followed once."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.FormattedValue):
        return texts_of(assigned.get(ast.unparse(node.value)), {})
    if isinstance(node, ast.JoinedStr):
        parts = [texts_of(part, assigned) for part in node.values]
        return ["".join(chosen) for chosen in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return texts_of(node.body, assigned) + texts_of(node.orelse, assigned)
    return ["{}"]


def says_what_to_do(text):
    """Whether a part of the message is an imperative, or says what is accepted."""
    starts = re.split(r"[.:;,?)}] | or | and | then ", text)
    words = {start.split()[0].strip("`'(\"").lower() for start in starts if start and start.split()}
    return bool(words & STEPS or ACCEPTED.search(text.lower()))


def raises():
    """`(place, text)` of every project error; the name of the place tells which one to mend."""
    paths = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    trees = {path: ast.parse(path.read_text("utf-8")) for path in paths}
    errors = errors_of(trees)
    for path, tree in trees.items():
        assigned = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.IfExp):
                assigned[ast.unparse(node.targets[0])] = node.value
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            if ast.unparse(node.exc.func).split(".")[-1] in errors:
                place = f"{path}:{node.lineno}"
                for text in texts_of(node.exc.args[0], assigned):
                    yield place, text


def faults(text):
    if not text.strip("{}"):
        return []  # the rest is written elsewhere
    found = []
    if not re.match(r"[A-Z`{]|\w+=|diffusers ", text):
        found.append("does not begin like a sentence")
    if not re.search(r"[.?}]$|\.\.\.$", text):
        found.append("does not end like a sentence")
    if not says_what_to_do(text):
        found.append("says no next step")
    return found


def test_every_message_states_a_fact_and_a_next_step():
    messages = list(raises())
    wrong = [(place, fault, text) for place, text in messages for fault in faults(text)]
    assert not wrong, "\n".join(" ".join(line) for line in wrong)
    assert len(messages) > 200
    # What the rule cannot see are a few messages made by a function.
    assert sum(not text.strip("{}") for _, text in messages) < 12


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("The file is broken.", "says no next step"),
        ("the file is broken. Write it again.", "does not begin like a sentence"),
        ("The file is broken. Write it again", "does not end like a sentence"),
        ("The file is broken. Write it again.", None),
        ("`rank` must be a whole number, got {}.", None),
        ("{} is not the erased model ({}). Was a LoRA fused?", None),
    ],
)
def test_the_rule(text, fault):
    assert faults(text) == ([] if fault is None else [fault])
