"""`save` is whole: an exception leaves the old folder or the new one, and so does a killed process."""

import copy
import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.classifiers import token_classifier

import more_hf
from more_hf.saving.files import replace_folder


PACKAGE = str(Path(more_hf.__file__).parent)
KEPT = {"README.md": b"a card", "cat.png": b"a picture", ".git/HEAD": b"ref: refs/heads/main"}


class Interruption(BaseException):
    """Not an `Exception`, as a key press is not."""


class Tracer:
    """Count the events in the package's own frames, and raise at one of them."""

    def __init__(self, stop=None):
        self.stop, self.count = stop, 0

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        self.count += 1
        if self.count == self.stop:
            raise Interruption
        return self

    def run(self, call):
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(None)


@pytest.fixture(scope="module")
def erased():
    """Two erasures of a classifier of one layer."""
    sizes = {"patch_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model, generator = token_classifier(num_labels=4, **sizes), torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 4
    data = [(images, labels)]
    return [more_hf.erase_classes(copy.deepcopy(model), data, [i], solver="covariance") for i in (1, 2)]


def state(folder):
    """What is in a folder, `None` if there is none."""
    if not folder.exists():
        return None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def earlier_save(model, folder):
    more_hf.save(model, folder)
    for name, content in KEPT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def interrupt(erased, tmp_path, existing, events):
    """Raise at some of the events, one at a time, and check what is there afterwards."""
    first, second = erased
    folder, template = tmp_path / "model", tmp_path / "template"

    def reset():
        shutil.rmtree(folder, ignore_errors=True)
        if existing:
            shutil.copytree(template, folder)

    if existing:
        earlier_save(first, template)
    reset()
    before = state(folder)
    more_hf.save(second, folder)  # whatever is done once only
    reset()
    tracer = Tracer()
    tracer.run(lambda: more_hf.save(second, folder))
    after = state(folder)
    assert after != before
    assert not existing or KEPT.keys() <= after.keys()

    seen = set()
    for stop in events(tracer.count):
        reset()
        with pytest.raises(Interruption):
            Tracer(stop).run(lambda: more_hf.save(second, folder))
        found = state(folder)
        assert found in (before, after), f"a mixture after event {stop}"
        remains = {path.name for path in tmp_path.iterdir()} - {"model", "template"}
        assert not remains, f"after event {stop}"
        seen.add(found == after)
    assert False in seen


@pytest.mark.parametrize("existing", [False, True], ids=["new", "over_an_earlier_save"])
def test_an_exception_at_some_points(erased, tmp_path, existing):
    def some(count):
        return [*range(1, count, count // 8), *range(count - 40, count, 5)]

    interrupt(erased, tmp_path, existing, some)


@pytest.mark.slow
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over_an_earlier_save"])
def test_an_exception_at_many_points(erased, tmp_path, existing):
    """At every twentieth event, with `--hypothesis-profile=long` at every one."""
    step = 1 if settings.get_current_profile_name() == "long" else 20
    interrupt(erased, tmp_path, existing, lambda count: range(1, count, step))


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_the_next_call_cleans_up_after_a_killed_process(erased, tmp_path, monkeypatch, renames):
    folder = tmp_path / "model"
    earlier_save(erased[0], folder)
    before = state(folder)
    rename, done = Path.rename, []

    def killed_at(path, target):
        if len(done) >= renames:
            os._exit(9)
        done.append(target)
        return rename(path, target)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(Path, "rename", killed_at)
        ignored = shutil.ignore_patterns(".git", "*.md", "*.png")
        replace_folder(folder, lambda draft: shutil.copytree(folder, draft, ignore=ignored))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) > 1 or not folder.exists()

    with pytest.raises(ZeroDivisionError):
        replace_folder(folder, lambda draft: 1 / 0)
    assert state(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_renamed(erased, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(more_hf.ExportError, match="working directory"):
        more_hf.save(erased[0], ".")
    (tmp_path / "file").write_text("")
    with pytest.raises(more_hf.ExportError, match="is a file"):
        more_hf.save(erased[0], tmp_path / "file")
