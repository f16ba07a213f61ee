"""`.ci/check_sizes`: what enters the history is small, or named."""

import shutil
import subprocess
from pathlib import Path

import pytest


CI = Path(__file__).parents[2] / ".ci"


@pytest.fixture
def repository(tmp_path):
    """A repository with the check and nothing else."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(CI / "check_sizes", tmp_path / ".ci")
    (tmp_path / ".ci" / "large_files").write_text("")
    git(tmp_path, "init", "-q")
    return tmp_path


def git(folder, *arguments):
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", *name, *arguments], cwd=folder, check=True)


def check(folder):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "Change")
    return subprocess.run([folder / ".ci" / "check_sizes"], cwd=folder, capture_output=True, text=True)


def test_a_large_file_is_refused_until_it_is_named(repository):
    (repository / "small.png").write_bytes(bytes(500_000))
    assert check(repository).returncode == 0

    (repository / "a picture.png").write_bytes(bytes(500_001))
    refused = check(repository)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[1:] == ["a picture.png"]

    (repository / ".ci" / "large_files").write_text("a picture.png\n")
    assert check(repository).returncode == 0
