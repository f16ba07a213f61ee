"""`more-hf tune`: the command is the call, it asks on a terminal only, and a flag answers every question."""

import html
import sys

import pytest

import more_hf
from more_hf.cli.main import main
from more_hf.core.record import RECORD
from more_hf.tuning.study import Study


TUNE = "tune emoji-sd --concept Noto --candidates Fluent Twemoji --pictures 16 --steps 2 --study study"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, painter):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_without_questions(folder, capsys):
    assert main(f"{TUNE} --pick 2 --save erased --lora noto.safetensors --yes".split()) == 0
    study, printed = Study.load("study"), capsys.readouterr().out
    assert str(study) in printed
    assert "more-hf push erased NAME/REPO" in printed
    assert study.setup.sampling == {"num_inference_steps": 2}
    assert more_hf.get_erasure(more_hf.load("erased")).request == study.choices[1].request
    assert (folder / "noto.safetensors").is_file()
    assert not (folder / "erased-push").exists()


@pytest.mark.slow
def test_without_an_answer_nothing_is_saved(folder, capsys):
    assert main(TUNE.split()) == 0
    assert "--pick 1 --save DIR" in capsys.readouterr().out
    assert [file.name for file in folder.iterdir()] == ["study"]


@pytest.mark.slow
def test_questions(folder, monkeypatch, capsys):
    answers = iter(["7", "2", "erased", "", "me/without-noto"])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(TUNE.split()) == 0
    assert (folder / "erased" / RECORD).is_file()
    assert more_hf.get_erasure(more_hf.load("erased")).request == Study.load("study").choices[1].request
    assert next(answers, None) is None
    # the push is prepared, with the study's table and sheet on the card
    card = (folder / "erased-push" / "README.md").read_text("utf-8")
    (line,) = [line for line in card.splitlines() if "| yes" in line]
    assert line.startswith(f"| 2      | {Study.load('study').choices[1].label}")
    assert Study.load("study").judged in html.unescape(card).replace("\\", "")
    assert "before_after.png" in card
    assert (folder / "erased-push" / "before_after.png").stat().st_size > 1000
    assert "- more-hf" in card
    assert not (folder / "noto.safetensors").exists()


def test_a_push_needs_a_folder(capsys):
    assert main("tune emoji-sd --concept Noto --push me/without-noto".split()) == 2
    assert "Add `--save DIR`" in capsys.readouterr().err


def test_a_typing_error_is_refused_before_anything_is_loaded(capsys):
    assert main("tune emoji-sd --concept Notto".split()) == 2
    assert "Did you mean 'Noto'?" in capsys.readouterr().err
