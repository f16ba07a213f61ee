"""What all commands have in common: help, version, interrupts, failures in one line, light imports."""

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest

from more_hf import __version__
from more_hf.cli.main import main, parse
from more_hf.cli.options import read_model, refuse_missing_model
from more_hf.core import request as options
from more_hf.core.errors import MoreError
from more_hf.core.routers import ROUTERS
from more_hf.diffusion.encoder import TOKENS
from more_hf_bench.classes import DATASETS
from more_hf_bench.classes.sources import SOURCES


COMMANDS = ["", "demo", "erase", "erase-classes", "tune", "compare", "evaluate", "lora", "verify", "push"]
COMMANDS += ["bench", "bench artists", "bench kd", "bench attacks", "bench report"]

# Runs one command in a process of its own and reports which heavy libraries it imported.
LIGHT = """
import sys
from more_hf.cli.main import main

status = 0
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "diffusers", "transformers", "datasets", "accelerate", "PIL", "numpy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else status)
"""


def light(*argv, **options):
    return subprocess.run([sys.executable, "-c", LIGHT, *argv], capture_output=True, text=True, **options)


def help_of(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_two_examples_that_parse(command, capsys):
    text = help_of(command, capsys)
    assert text.startswith(f"usage: more-hf {command}".rstrip())
    examples = re.findall(r"^  more-hf (.*)$", text.partition("examples:")[2], re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert callable(parse(shlex.split(example.partition(" && ")[0])).run)
        assert example.startswith(command) or command == ""


@pytest.mark.parametrize(
    "argv", [["--help"], ["bench", "artists", "--help"], ["bench", "kd", "--help"], ["--version"]]
)
def test_help_is_light(argv):
    done = light(*argv)
    assert done.returncode == 0, done.stderr
    assert "more-hf" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("erase emoji-sd --concept Notto --remap_to Fluent --output out", "Did you mean 'Noto'?"),
        ("erase ./missing --concept Noto --remap_to Fluent --output out", "There is no folder 'missing'."),
        ("erase-classes --model a/b/c --data . --forget 3 --output out", "There is no folder 'a/b/c'."),
        ("compare nowhere --prompts x", "There is no folder 'nowhere'."),
        ("bench artists --methods mroe --forget all --output out", "Did you mean 'more'?"),
        ("bench artists --forget all --prompts missing.csv --output out", "no table of that name"),
        ("bench artists --forget Blobmojy --output out", "Did you mean 'Blobmoji'?"),
        ("bench artists --forget all --remap_to Notto --output out", "Did you mean 'Noto'?"),
        ("bench kd --methods esk --forget 3 --output out", "Did you mean 'esc'?"),
        ("bench kd --dataset cifar-10 --forget 3 --output out", "Did you mean 'cifar10'?"),
        ("bench report missing", "There is no folder 'missing'."),
        ("push missing me/model", "There is no folder 'missing'."),
    ],
)
def test_wrong_arguments_are_refused_before_anything_heavy(command, message, tmp_path):
    done = light(*command.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_module_runs_and_has_a_version():
    done = subprocess.run([sys.executable, "-m", "more_hf", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == f"more-hf {__version__}\n"


def test_dashes_are_underscores():
    words = "erase emoji-sd --concept a-b --remap{}to c-d --num{}experts=2 --output out-put"
    dashes, underscores = (parse(words.format(mark, mark).split()) for mark in "-_")
    assert dashes == underscores
    assert (dashes.concept, dashes.remap_to, dashes.num_experts) == (["a-b"], ["c-d"], 2)


def test_choices_are_the_librarys():
    assert tuple(ROUTERS) == options.ROUTERS
    assert set(options.TOKENS) == set(TOKENS)
    assert tuple(SOURCES) == DATASETS


def test_a_hub_id_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "is" / "one").mkdir(parents=True)
    for model in ("gpt2", "owner/name", "emoji-sd", "./here", "here/is/one", str(tmp_path)):
        refuse_missing_model(model)
    for model in ("./owner/name", "../name", "a/b/c", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match="no folder"):
            refuse_missing_model(model)


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_interrupted(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("more_hf_bench.cli.demo.emoji_artist", interrupt)
    monkeypatch.setattr("more_hf.cli.verify.refuse_missing_folder", interrupt)
    monkeypatch.setattr("more_hf_bench.cli.classes.read_options", interrupt)
    for command in ("demo --output missing", "verify missing"):
        assert main(command.split()) == 130
        assert capsys.readouterr().err == "Interrupted. Nothing was written.\n"
    assert main(["demo", "--output", "."]) == 130
    assert "holds a part of the result" in capsys.readouterr().err
    assert main("bench kd --forget 3 --output .".split()) == 130
    assert capsys.readouterr().err == "Interrupted. Run the same command again to continue.\n"


def test_a_missing_extra_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["bench", "kd", "--dataset", "digits", "--forget", "3", "--output", str(tmp_path)]) == 2
    assert "pip install 'more_hf[bench]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "more_hf_bench.artists.demo", None)
    with pytest.raises(ModuleNotFoundError):  # a bug of ours, whose traceback is wanted
        main(["demo", "--output", str(tmp_path)])


def test_both_forms_of_a_model_and_of_what_to_forget():
    forms = (
        "{} MODEL {} --concept a b --output out",
        "{} --model MODEL {} --forget a b --output out",
        "{} {} --forget a --concept b --model MODEL --output out",
    )
    commands = {"erase": "--remap_to none", "lora": "--remap_to none", "erase-classes": "--data ."}
    for command, rest in commands.items():
        for form in forms:
            args = parse(form.format(command, rest).split())
            assert read_model(args) == "MODEL"
            assert vars(args).get("concept", vars(args).get("forget")) == ["a", "b"]
    benches = ("bench artists --output out", "bench kd --output out", "bench attacks --model m --output out")
    for command in ("demo", *benches):
        args = parse(f"{command} --concept a --forget b".split())
        assert vars(args).get("concept", vars(args).get("forget")) == ["a", "b"]


def test_a_class_that_a_folder_does_not_name_is_refused_before_anything_heavy(tmp_path):
    (tmp_path / "model").mkdir()
    labels = {"0": "tench, Tinca tinca", "1": "crane", "10": "crane"}
    (tmp_path / "model" / "config.json").write_text(json.dumps({"id2label": labels}))
    words = "erase-classes ./model --data . --output out --forget"
    for wanted, message in (("tensh", "no class 'tensh'"), ("crane", "2 classes"), ("3", "no class 3")):
        done = light(*words.split(), wanted, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr


def test_a_folder_called_like_a_data_set_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    monkeypatch.setattr("more_hf_bench.machine.processes", interrupt)
    words = ["bench", "kd", "--forget", "3", "--output", "out", "--dataset"]
    assert main([*words, "digits"]) == 130
    assert "write ./digits" in capsys.readouterr().err
    assert main([*words, "./digits"]) == 130
    assert "built-in" not in capsys.readouterr().err


def test_the_other_processes_of_a_benchmark_make_no_table(monkeypatch, capsys):
    state = SimpleNamespace(num_processes=2, is_main_process=False, device=SimpleNamespace(type="cpu"))
    monkeypatch.setattr("more_hf_bench.machine.processes", lambda device=None: state)
    monkeypatch.setattr("more_hf_bench.classes.run.run_kd", lambda *args, **options: [])
    assert main("bench kd --forget 3 --output out".split()) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "Running in 2 processes on cpu.\n"


def test_unknown_flags_exit_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--limit", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_debug_raises(tmp_path, monkeypatch):
    monkeypatch.setenv("MORE_HF_DEBUG", "1")
    with pytest.raises((MoreError, OSError)):
        main(["verify", str(tmp_path)])
