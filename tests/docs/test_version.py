"""The version is in one place, and each release is told in ten lines."""

import re
from pathlib import Path

from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

import more_hf


ROOT = Path(__file__).parents[2]
RELEASES = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)[1:]


def test_everything_has_the_version_of_the_package():
    assert ProjectMetadata(str(ROOT), PluginManager()).version == more_hf.__version__
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.+)$", citation, re.MULTILINE) == [more_hf.__version__]
    assert RELEASES[0].split()[0] == more_hf.__version__


def test_a_release_is_told_in_ten_lines():
    assert len(RELEASES) > 1
    for release in RELEASES:
        _, *lines = filter(None, release.splitlines())
        assert 0 < len(lines) <= 10
