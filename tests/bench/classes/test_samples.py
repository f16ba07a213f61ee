"""Random samples forgotten: rows against recomputation, the gap by hand; and the scripts beside."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.rows import records

from more_hf.classification.erase import erase_classes
from more_hf.cli.main import main
from more_hf.data.models import AllCNNForImageClassification
from more_hf_bench.classes import run as kd
from more_hf_bench.classes import samples as kd_samples
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.training import predict
from more_hf_bench.columns import read_cells
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import split_by_class, split_by_sample


pytestmark = pytest.mark.slow

KD = Path(__file__).parents[3] / "benchmarks" / "kd"
METHODS = ["original", "retrain", "remap-samples"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("samples")
    command = f"bench kd --dataset digits --methods {','.join(METHODS)} --forget samples --epochs 3"
    assert main([*command.split(), "--output", str(output)]) == 0
    return output


def rows_of(folder):
    return {row["method"]: row for row in records(folder / "rows.csv")}


def test_rows_are_those_of_the_models(folder):
    data = load_kd_data("digits")
    splits, rows = split_by_sample(data, 0.1, seed=0), rows_of(folder)
    assert list(rows) == METHODS
    for method, place in (("original", "seed0"), ("retrain", "without-0.1-seed0")):
        model = AllCNNForImageClassification.from_pretrained(
            folder / "models" / f"digits-allcnn-narrow-{place}" / "model"
        )
        for name in ("f", "r", "rt"):
            part = getattr(splits, name)
            hits = (predict(model, part) == part.labels).float().mean().item()
            assert rows[method][f"acc_{name}"] == pytest.approx(100 * hits, abs=1e-4)
    assert rows["original"]["n_f"] == round(0.1 * len(data.train))
    trained_on = json.loads(
        (folder / "models" / "digits-allcnn-narrow-without-0.1-seed0" / "training.json").read_text()
    )
    assert trained_on["images"] == len(splits.r)
    assert not torch.isin(splits.f.rows, splits.r.rows).any()


def test_gap_is_the_mean_distance_to_retrain(folder):
    summary = {line["method"]: line for line in kd_samples.summarise(pd.DataFrame(rows_of(folder).values()))}
    rows = rows_of(folder)
    for method in METHODS:
        measured = ("acc_f", "acc_r", "acc_rt", "mia_member")
        distances = [abs(rows[method][name] - rows["retrain"][name]) for name in measured]
        assert summary[method]["gap"] == pytest.approx(sum(distances) / 4)
    assert summary["retrain"]["gap"] == 0 < summary["original"]["gap"]
    alone = kd_samples.summarise(pd.DataFrame([rows["original"]]))
    assert alone[0]["gap"] is None
    assert kd_samples.short_table(alone)[0]["gap ↓"] == ""


def test_run_again_and_report(folder, monkeypatch, capsys):
    before = (folder / "table.md").read_text()
    assert before.startswith("The original recognises ")
    monkeypatch.setattr(kd, "measure_samples", lambda *args: pytest.fail("measured twice"))
    assert main(["bench", "report", str(folder)]) == 0
    assert "remap-samples" in capsys.readouterr().out
    assert (folder / "table.md").read_text() == before
    kd.run_kd("digits", "allcnn-narrow", METHODS, "samples", output=folder, epochs=3)
    assert (folder / "table.md").read_text().splitlines()[:6] == before.splitlines()[:6]


def test_refusals(folder, tmp_path):
    with pytest.raises(BenchmarkError, match="no method 'more' that forgets samples.*remap-samples"):
        kd.run_kd("digits", "allcnn-narrow", ["more"], "samples", output=tmp_path / "new")
    with pytest.raises(BenchmarkError, match="evaluation: fraction is 0.1 there, 0.2 here"):
        kd.run_kd("digits", "allcnn-narrow", METHODS, "samples", output=folder, epochs=3, fraction=0.2)
    assert not (tmp_path / "new").exists()


# the scripts beside the benchmark


def script(name):
    spec = importlib.util.spec_from_file_location(f"kd_{name}", KD / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_settings_are_chosen_on_validation_images(folder, tmp_path, monkeypatch):
    choose = script("choose")
    monkeypatch.setattr(choose, "GRIDS", {"lau": [{"lr": 1e-6}, {"lr": 0.3}], "neggrad": [{"lr": 1e30}]})
    command = "choose.py --dataset digits --model allcnn-narrow --forget 3 --epochs 3"
    command += f" --models {folder / 'models'} --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    choose.main()
    rows = read_cells(tmp_path / "grid.csv")
    assert [row["method"] for row in rows] == ["lau", "lau", "neggrad"]
    assert float(rows[2]["hm_validation"]) == 0  # not finite is a result
    first, second = (float(row["hm_validation"]) for row in rows[:2])
    assert first != second
    chosen = json.loads((tmp_path / "settings.json").read_text())["lau"]
    assert chosen == {"lr": 1e-6 if first > second else 0.3}
    monkeypatch.setattr(choose, "try_out", lambda *args: pytest.fail("tried twice"))
    choose.main()


def sweep(monkeypatch, folder, output, *arguments):
    """Its lines; on digits without class 3, with the classifiers of `folder`."""
    fixed = f"--dataset digits --forget 3 --epochs 3 --models {folder / 'models'} --output {output}"
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments, *fixed.split()])
    script("sweep").main()
    return read_cells(output / "sweep.csv")


def test_sweep_gives_a_line_per_value(folder, tmp_path, monkeypatch, capsys):
    lines = sweep(monkeypatch, folder, tmp_path, "target", "--values", "5", "8")
    found = [(line["target"], line["method"]) for line in lines]
    assert found == [(value, name) for value in "58" for name in ("remap", "remap-reloaded")]
    for value in "58":
        assert read_cells(tmp_path / f"target-{value}" / "rows.csv")[0]["sent_to"] == value
    assert lines[0]["kr_hm_t"] != lines[2]["kr_hm_t"]
    for line in lines:  # the paper's rate, then the others of Tables 9 and 15
        assert float(line["kr_hm_t_0.1"]) == pytest.approx(float(line["kr_hm_t"]), abs=1e-5)
        assert line["kr_hm_t_0.001"] != line["kr_hm_t_0.01"] != line["kr_hm_t_0.1"]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    text = (tmp_path / "sweep.md").read_text()
    assert "--models MODELS --output SWEEP" in text
    assert str(tmp_path) not in text
    assert text.count("| remap ") == 2


def test_another_process_than_the_first_writes_nothing_of_a_sweep(tmp_path, monkeypatch):
    sweep = script("sweep")
    monkeypatch.setattr(sweep, "run_kd", lambda *args, **options: [])
    monkeypatch.setattr(sys, "argv", ["sweep.py", "experts", "--dataset", "digits", "--forget", "3"])
    sys.argv += ["--output", str(tmp_path)]
    sweep.main()
    assert not list(tmp_path.iterdir())


def test_sweep_over_depth_edits_inner_modules_which_are_not_saved(folder, tmp_path, monkeypatch, capsys):
    lines = sweep(monkeypatch, folder, tmp_path, "depth", "--values", "features.6")
    # two lines of each, and no draw to average
    kinds = ("erase", "remap", "more")
    assert [line["depth"] for line in lines] == [f"features.6 {kind}" for kind in kinds for _ in range(2)]
    data = load_kd_data("digits")
    splits = split_by_class(data, [3])
    place = folder / "models" / "digits-allcnn-narrow-seed0" / "model"
    model = AllCNNForImageClassification.from_pretrained(place).eval()

    def hits():
        parts = (splits.ft, splits.rt)
        return [100 * (predict(model, part) == part.labels).float().mean().item() for part in parts]

    before = hits()
    erase_classes(model, data.train.loader(500), [3], remap_to=None, at="features.6")
    for line, expected in [(lines[0], hits()), *((reloaded, before) for reloaded in lines[1::2])]:
        assert [float(line["acc_ft"]), float(line["acc_rt"])] == pytest.approx(expected, abs=1e-4)
    assert lines[0]["kr_hm_t"] != lines[1]["kr_hm_t"]
    with pytest.raises(SystemExit):
        sweep(monkeypatch, folder, tmp_path, "depth")
    assert "depth needs the names of modules" in capsys.readouterr().err


def test_sweeps_are_the_papers():
    factors, data = script("sweep").FACTORS, load_kd_data("digits")
    remaining = [c for c in range(10) if c != 3]
    hundred = list(range(10, 100))

    def labels(factor, classes):
        return [variant.label for variant in factors[factor]([], data, classes)]

    assert labels("experts", remaining) == list("123456789")
    assert labels("experts", hundred) == [str(n) for n in range(10, 91, 10)]
    assert labels("target", remaining) == list("012456789")
    routers = {variant.label: variant for variant in factors["routers"]([], data, remaining)}
    assert len(routers) == 4 + 2 * 7
    assert len({json.dumps([v.method, v.settings]) for v in routers.values()}) == len(routers)
    assert len(factors["routers"]([], data, hundred)) == 4 * len(routers)
    trained = routers["8 prototype remain+forget+balance"].settings
    assert trained["epochs"] * len(data.train) == pytest.approx(500_000, rel=0.01)
    for factor in ("experts", "target", "routers", "projection", "depth"):
        values = ["head"] if factor == "depth" else []
        for variant in factors[factor](values, data, remaining):
            function = CLASSIFICATION[variant.method].load()
            assert set(variant.settings) <= set(inspect.signature(function).parameters)


def test_probe_benchmark_compares_the_same_probes(tmp_path, monkeypatch, capsys):
    probes = script("probes")
    monkeypatch.setattr(probes, "CSV", tmp_path / "probes.csv")
    monkeypatch.setattr(probes, "EPOCHS", 2)
    monkeypatch.setattr(sys, "argv", ["probes.py", "--one_by_one", "2"])
    probes.main()
    (row,) = read_cells(tmp_path / "probes.csv")
    assert float(row["largest_relative_weight_difference"]) < 1e-5
    assert row["largest_number_of_other_predictions"] == "0"
    assert float(row["ratio"]) > 1
