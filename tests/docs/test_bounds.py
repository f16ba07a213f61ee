"""No lower bound in pyproject.toml is below what an installed dependency asks of Python or of another one."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version


PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
LINES = sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"])


def lower(specifiers: SpecifierSet) -> Version:
    bounds = [Version(s.version) for s in specifiers if s.operator in (">=", "~=", "==")]
    return max(bounds, default=Version("0"))


OURS = {canonicalize_name(r.name): lower(r.specifier) for r in map(Requirement, LINES)}


@pytest.mark.parametrize("name", OURS)
def test_no_bound_is_below_what_a_dependency_asks_for(name):
    asked = distribution(name)
    too_low = []
    for requirement in map(Requirement, asked.requires or []):
        ours = OURS.get(canonicalize_name(requirement.name))
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if ours is not None and applies and ours < lower(requirement.specifier):
            too_low.append(f"{ours} is too low: {name} {asked.version} asks for {requirement}")
    assert too_low == []
    python = SpecifierSet(asked.metadata["Requires-Python"] or "")
    assert lower(SpecifierSet(PROJECT["requires-python"])) >= lower(python)


def test_every_extra_has_the_same_bounds():
    assert len({str(Requirement(line)) for line in LINES}) == len(OURS)
