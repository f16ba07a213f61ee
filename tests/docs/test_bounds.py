"""The lower bounds in pyproject.toml are not below what the installed dependencies ask of Python and of each other."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
LINES = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]


def lower(specifiers: SpecifierSet) -> Version:
    return max((Version(s.version) for s in specifiers if s.operator in (">=", "~=", "==")), default=Version("0"))


OURS = {canonicalize_name(r.name): lower(r.specifier) for r in map(Requirement, LINES)}


@pytest.mark.parametrize("name", OURS)
def test_no_bound_is_below_what_a_dependency_asks_for(name):
    asked = distribution(name)
    too_low = []
    for requirement in map(Requirement, asked.requires or []):
        ours = OURS.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if ours is not None and applies and ours < lower(requirement.specifier):
            too_low.append(f"{requirement.name} {ours}: {name} {asked.version} asks for {requirement.specifier}")
    assert too_low == []
    python = SpecifierSet(asked.metadata["Requires-Python"] or "")
    assert lower(SpecifierSet(PROJECT["requires-python"])) >= lower(python)


def test_every_extra_has_the_same_bounds():
    assert len({str(Requirement(line)) for line in LINES}) == len(OURS)
