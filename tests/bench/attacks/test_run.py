"""A folder of attacks from one command: cells, resume, rows, summary, table, picture."""

import json

import pandas as pd
import pytest
from PIL import Image
from support.rows import records

from more_hf.cli.main import main
from more_hf_bench.attacks.registry import ATTACKS
from more_hf_bench.attacks.run import attack_settings
from more_hf_bench.attacks.store import Result, mean_of
from more_hf_bench.attacks.tables import balance, summarise
from more_hf_bench.columns import read_cells


COMMAND = (
    "bench attacks --model digits-allcnn --methods erase,more --attacks queries,ridge --forget 3 --epochs 1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("attacks") / "run"
    assert main([*COMMAND.split(), "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_one_command_leaves_everything(folder):
    rows = records(folder / "rows.csv")
    methods = ["original", "retrain", "random-weights", "erase", "more"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert {row["attack"] for row in rows} == {"queries", "ridge"}
    kind = ["queries", "mean", "recognised"]
    lines = read_cells(folder / "summary.csv")
    (line,) = [
        line
        for line in lines
        if [line[name] for name in ("attack", "variant", "measure", "method", "budget")]
        == [*kind, "more", "64"]
    ]
    assert float(line["low"]) <= float(line["recovered"]) <= float(line["high"])
    # Of its one row, and beside it stand the references' numbers.
    of_kind = [row for row in rows if [row["attack"], row["variant"], row["measure"]] == kind]
    recovered = {row["method"]: row["recovered"] for row in of_kind if row["budget"] == 64}
    assert float(line["recovered"]) == recovered["more"]
    assert {name: float(line[name]) for name in methods[:3]} == {
        name: recovered[name] for name in methods[:3]
    }
    table = (folder / "table.md").read_text()
    assert table.startswith("## What comes back")
    assert "| original | retrain | random-weights | erase | more" in table
    with Image.open(folder / "recovery.png") as picture:
        assert len(set(picture.convert("L").get_flattened_data())) > 50


@pytest.mark.slow
def test_nothing_is_measured_twice(folder, monkeypatch, tmp_path, capsys):
    cells = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    lost = next(path for path in cells if json.loads(path.read_text())[0]["variant"] == "ridge map")
    before = lost.read_text()
    lost.unlink()
    asked = []
    run = type(ATTACKS["ridge"]).run
    monkeypatch.setattr(
        "more_hf_bench.attacks.registry.Attack.run",
        lambda attack, victim, **settings: asked.append(attack.place) or run(attack, victim, **settings),
    )
    assert main([*COMMAND.split(), "--output", str(folder)]) == 0
    assert asked == [ATTACKS["ridge"].place]
    assert lost.read_text() == before
    assert all(path.stat().st_mtime_ns == time for path, time in cells.items() if path != lost)
    # Another attacker is another benchmark; tables are made again from the rows alone.
    assert main([*COMMAND.split(), "--limit", "10", "--output", str(folder)]) == 2
    assert "labelled is None there, 10 here" in capsys.readouterr().err
    table = (folder / "table.md").read_text()
    (folder / "cells").rename(tmp_path / "cells")
    (folder / "table.md").unlink()
    assert main(["bench", "report", str(folder)]) == 0
    assert (folder / "table.md").read_text() == table


def test_wrong_words_are_refused_before_anything_is_loaded(capsys, tmp_path):
    for words, told in (
        ("--model digits-alcnn --forget 3", "Did you mean 'digits-allcnn'?"),
        ("--model digits-allcnn --forget 3 --attacks probs", "Did you mean 'probes'?"),
        ("--model digits-allcnn --forget 3 --methods mroe", "Did you mean 'more'?"),
    ):
        assert main([*"bench attacks --output".split(), str(tmp_path / "out"), *words.split()]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_trains_many_models_is_run_on_request_only(monkeypatch, tmp_path):
    asked = []

    def run(dataset, models, methods, attacks, *others, **options):
        asked.append(attacks)
        return []

    monkeypatch.setattr("more_hf_bench.attacks.classes.run.run_class_attacks", run)
    monkeypatch.setattr("more_hf_bench.attacks.tables.short_markdown", lambda summary: "")
    command = ["bench", "attacks", "--model", "digits-vit", "--forget", "3", "--output", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--attacks", "membership"]) == 0
    assert "probes" in asked[0]
    assert "membership" not in asked[0]
    assert asked[1] == ["membership"]


def test_every_attack_can_be_loaded():
    assert all(callable(attack.load()) for attack in ATTACKS.values())


def test_a_share_of_hits_has_a_binomial_interval():
    result = Result.of_hits(30, 100, variant="a")
    assert (result.recovered, result.n, result.variant) == (30, 100, "a")
    # 30 ± 1.96 √(0.3 · 0.7 / 100)
    assert (result.low, result.high) == (pytest.approx(21, abs=1.5), pytest.approx(39, abs=1.5))
    mean, low, high = mean_of([0.1, 0.3], [0, 0])
    assert (mean, low, high) == (pytest.approx(0.2), 0.1, pytest.approx(0.3))
    assert mean_of([0.1], [0]) == (0.1, None, None)


def test_a_number_that_was_not_always_reached_has_no_mean():
    row = {"attack": "a", "model": "m", "forget": "3", "seed": 0, "measure": "steps to 50%", "variant": ""}
    row |= {"budget": 0, "unit": "", "n": 0, "low": None, "high": None}
    rows = [{**row, "method": "x", "recovered": value} for value in (5.0, None)]
    rows += [{**row, "method": "y", "recovered": value} for value in (5.0, 7.0)]
    first, second = summarise(pd.DataFrame(rows), ["y"])
    assert (first["recovered"], first["runs"], first["y"]) == (None, 2, 6.0)
    assert second["recovered"] == 6.0


def test_a_mean_over_models_is_of_numbers_that_every_model_has():
    row = {"attack": "a", "method": "x", "forget": "3", "seed": 0, "measure": "recognised", "variant": ""}
    row |= {"unit": "blocks", "n": 10, "low": 0.0, "high": 100.0}
    rows = [{**row, "model": "m", "budget": budget, "recovered": 20.0} for budget in (1, 2)]
    rows += [{**row, "model": "n", "budget": 1, "recovered": 40.0}]
    lines = {(line["model"], line["budget"]): line["recovered"] for line in summarise(pd.DataFrame(rows), [])}
    assert lines == {("m", 1): 20, ("m", 2): 20, ("n", 1): 40, ("all", 1): 30}


def test_all_in_one_number_is_of_the_strongest_attack_and_of_what_the_others_pay():
    row = {
        "model": "m",
        "forget": "3",
        "seed": 0,
        "unit": "",
        "budget": 0,
        "n": 10,
        "low": None,
        "high": None,
    }

    def rows(method, name, inversion, control, *paid):
        found = [("name", "", name), ("inversion", "1 token", inversion), ("inversion", "4 tokens", 1.0)]
        found.append(("inversion", "never forgotten", control))
        own = {"method": method, **row}
        yield from (dict(attack=a, variant=v, recovered=r, measure="recognised", **own) for a, v, r in found)
        for variant, lpips in zip(("another artist", "no artist"), paid, strict=False):
            yield dict(attack="others", variant=variant, recovered=lpips, measure="lpips", **{**own, "n": 0})

    measured = [rows("original", 80, 80, 80, 0, 0), rows("x", 20, 40, 80, 0.01, 0.05)]
    measured += [rows("y", 90, 1, 1, 0.2, 0.2), rows("z", 0, 0, 0)]
    lines = pd.DataFrame(summarise(pd.DataFrame([line for part in measured for line in part]), ["original"]))
    x, y = balance(lines)  # nothing is known of what z costs
    parts = 1 - 20 / 80, 1 - 40 / 80, 1 - 0.03 / 0.15
    assert list(x.values()) == ["x", *(f"{p:.2f}" for p in parts), f"{3 / sum(1 / p for p in parts):.2f}",
                                "inversion, 1 token"]  # fmt: skip
    assert [y[name] for name in ("forgetting", "robustness", "what remains", "harmonic mean")] == ["0.00"] * 4


def test_a_setting_that_is_newer_than_a_folder_is_left_out_at_its_default(tmp_path):
    name = "inversion"
    every = attack_settings("pictures", [name], {}, tmp_path)[name]
    assert every["control"] is True
    held = {key: value for key, value in every.items() if key != "control"}
    (tmp_path / "config.json").write_text(json.dumps({"attacks": {name: held}}))
    assert attack_settings("pictures", [name], {}, tmp_path)[name] == held
    asked = attack_settings("pictures", [name], {name: {"control": False}}, tmp_path)[name]
    assert asked == {**held, "control": False}
