"""The class benchmark from one call: cells, resume, rows, tables, plots; against recomputation."""

import copy
import html
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from support.compare import same
from support.rows import records

from more_hf.api import get_erasure
from more_hf.cli.main import main
from more_hf.data import FOLDER, load_classifier
from more_hf.data.models import AllCNNForImageClassification
from more_hf_bench.classes import measure as measuring
from more_hf_bench.classes import run as kd
from more_hf_bench.classes import training
from more_hf_bench.classes.data import load_kd_data
from more_hf_bench.classes.features import cache, same_backbone
from more_hf_bench.classes.metrics import class_means
from more_hf_bench.classes.probes import sgd_probes
from more_hf_bench.classes.store import ClassesConfig
from more_hf_bench.classes.summary import NUMBERS, summarise
from more_hf_bench.classes.training import accuracy, predict
from more_hf_bench.cli.report import benchmark_of
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.registry import CLASSIFICATION
from more_hf_bench.splits import split_by_class


pytestmark = pytest.mark.slow

SMALL = {"epochs": 3, "probe_seeds": 1, "passes": (3,)}
METHODS = ("original", "retrain", "esc", "remap", "more")
OURS = ["remap", "remap-reloaded", "more", "more-reloaded", "more-inverted", "more-x3"]
ROWS = ["original", "retrain", "esc", *OURS]
COSTS = ("seconds", "peak_memory")


def rebuilt(folder):
    tables, config = benchmark_of(folder)
    return tables.write_outputs(folder, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("kd")
    kd.run_kd("digits", "allcnn-narrow", METHODS, ["3"], output=output, **SMALL)
    return output


@pytest.fixture(scope="module")
def data():
    return load_kd_data("digits")


@pytest.fixture(scope="module")
def original(folder):
    return AllCNNForImageClassification.from_pretrained(
        folder / "models" / "digits-allcnn-narrow-seed0" / "model"
    ).eval()


def rows_of(folder):
    return {row["method"]: row for row in records(folder / "rows.csv")}


def head_inputs(model, images):
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(images[torch.arange(len(images))]["pixel_values"])
    handle.remove()
    return seen[0]


def test_a_trained_classifier_is_taken_as_it_is(tmp_path, data):
    """The packaged folder holds half precision and no image processor."""
    name = str(FOLDER / "classifiers" / "digits-allcnn")
    summary = kd.run_kd("digits", name, ["original"], ["3"], output=tmp_path / "run", epochs=0, probe_seeds=1)
    remaining = split_by_class(data, ["3"]).rt
    expected = accuracy(predict(load_classifier("digits-allcnn"), remaining), remaining.labels)
    assert summary[0]["acc_rt"] == pytest.approx(expected)
    assert expected > 95
    for model, methods in (("allcnn-narrow", ["original"]), (name, ["original", "retrain"])):
        with pytest.raises(BenchmarkError, match="Nothing is trained in 0 epochs"):
            kd.run_kd("digits", model, methods, ["3"], output=tmp_path / "refused", epochs=0)
    assert not (tmp_path / "refused").exists()


def test_one_call_leaves_everything(folder):
    assert {path.name for path in (folder / "plots").iterdir()} == {"tsne.png", "cosines.png", "cost.png"}
    assert list(rows_of(folder)) == ROWS
    probes = records(folder / "probes.csv")
    # three learning rates, and one that converged
    assert len(probes) == len(ROWS) * (3 * SMALL["probe_seeds"] + 1)
    assert {probe["learning_rate"] for probe in probes} == {"converged", "0.1", "0.01", "0.001"}
    assert not list(folder.rglob("*.part"))
    table = (folder / "table.md").read_text()
    assert table.startswith("The original recognises ")
    assert all(f"| {name} " in table for name in ROWS)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert table.partition("\n")[0] in html.unescape(page)
    assert "<input" not in page  # there are no prompts to look for


def test_accuracies_are_those_of_the_model_that_was_trained(folder, data, original):
    splits, row = split_by_class(data, [3]), rows_of(folder)["original"]
    for name in ("f", "r", "ft", "rt"):
        part = getattr(splits, name)
        assert row[f"acc_{name}"] == pytest.approx(
            100 * (predict(original, part) == part.labels).float().mean().item(), abs=1e-4
        )
        assert row[f"n_{name}"] == len(part)
    f, r = row["acc_f"], row["acc_r"]
    assert row["hm"] == pytest.approx(2 * (100 - f) * r / (100 - f + r), abs=1e-4)


def test_remap_row_is_erase_classes_and_reloading_takes_only_the_hook_away(folder, data, original):
    splits, rows = split_by_class(data, [3]), rows_of(folder)
    edited = CLASSIFICATION["remap"].load()(copy.deepcopy(original), splits, seed=0)
    assert rows["remap"]["sent_to"] == ", ".join(get_erasure(edited).facts.sent_to["3"])
    for name in ("ft", "rt"):
        part = getattr(splits, name)
        expected = 100 * (predict(edited, part) == part.labels).float().mean().item()
        assert rows["remap"][f"acc_{name}"] == pytest.approx(expected, abs=1e-4)
        # the head holds the edit
        assert rows["remap-reloaded"][f"acc_{name}"] == pytest.approx(expected, abs=1e-4)
    for column, value in rows["original"].items():  # and the features are the original's
        if column.startswith(("kr_acc", "kr_hm", "kr_converged_acc", "cka_original")):
            assert rows["remap-reloaded"][column] == pytest.approx(value, abs=1e-3), column
    assert rows["remap"]["kr_converged_auc_target"] < rows["remap-reloaded"]["kr_converged_auc_target"]
    assert rows["remap"]["kr_acc_f"] < rows["original"]["kr_acc_f"] - 20


def test_heads_of_other_shapes(folder, data, original):
    """By hand, on the features of the original; the digits have fewer than 500 images of each class."""
    rows, splits = rows_of(folder), split_by_class(data, [3])
    train, test = (head_inputs(original, part).double().numpy() for part in (data.train, data.test))
    labels, asked = data.train.labels.numpy(), data.test.labels.numpy()
    lengths = np.linalg.norm(test, axis=1)[:, None] * np.linalg.norm(train, axis=1)
    nearest = np.argsort(-(test @ train.T) / lengths, axis=1)[:, :5]
    voted = np.array([np.bincount(labels[five], minlength=10).argmax() for five in nearest])
    for split, mask in (("ft", asked == 3), ("rt", asked != 3)):
        expected = 100 * (voted[mask] == asked[mask]).mean()
        assert rows["original"][f"kr_knn_acc_{split}"] == pytest.approx(expected, abs=100 / mask.sum())
        assert rows["original"][f"kr_mlp_acc_{split}"] > 80
    # LEACE hides the class from one head for it against the rest, and not from a head for all classes.
    binary = LogisticRegression(C=1e4, max_iter=5000).fit(train, labels == 3)
    expected = 100 * roc_auc_score(asked == 3, binary.decision_function(test))
    assert rows["original"]["kr_binary_auc_rest"] == pytest.approx(expected, abs=0.3)
    blind = CLASSIFICATION["leace-rest"].load()(copy.deepcopy(original), splits)
    parts = {"train": data.train, "test": data.test}
    cached, plain = cache(blind, blind.classifier, parts), cache(original, original.classifier, parts)
    means = class_means(plain.features("train"), data.train.labels, 10)
    settings = {"forget": [3], "targets": [], "original": plain, "retrained": None, "original_means": means}
    places = kd.Places.of(data, splits)
    row = kd_measure(cached, places, **settings, probe_seeds=[0], shared=measuring.Shared()).row
    assert row["kr_binary_auc_rest"] < 70
    assert row["kr_converged_auc_rest"] > 90


def test_the_index_of_information_is_between_original_and_retrain(folder):
    rows = rows_of(folder)
    assert rows["original"]["idi"] == 1
    assert rows["retrain"]["idi"] == 0
    # The blocks of what is saved are the original's, and its head reads what the original's reads.
    assert rows["more-reloaded"]["idi"] == rows["remap-reloaded"]["idi"] == 1
    # What a router leaves may be less than what Retrain's head reads, and counts as none: the blocks decide.
    assert 0.5 < rows["more"]["idi"] <= rows["more-inverted"]["idi"] <= 1
    assert rows["more"]["idi"] < 0.9


def test_reloaded_is_what_save_pretrained_gives(data, original, tmp_path):
    edited = CLASSIFICATION["more"].load()(copy.deepcopy(original), split_by_class(data, [3]))
    edited.save_pretrained(tmp_path)
    expected = AllCNNForImageClassification.from_pretrained(tmp_path).state_dict()
    with kd.reloaded(edited) as found:
        assert same(found, expected)
        assert get_erasure(found) is None
    assert not torch.equal(expected["classifier.weight"], original.classifier.weight)


def test_retrain_never_saw_the_class_and_is_priced_as_a_training(folder):
    rows = rows_of(folder)
    assert rows["retrain"]["acc_f"] == rows["retrain"]["acc_ft"] == 0
    assert rows["retrain"]["cka_retrain_r"] == pytest.approx(1)
    assert rows["original"]["cka_original_r"] == pytest.approx(1)
    assert 0 < rows["original"]["cka_retrain_f"] < 0.999
    trained = folder / "models" / "digits-allcnn-narrow-without-3-seed0"
    log = (trained / "log.csv").read_text().splitlines()
    assert rows["retrain"]["seconds"] == float(log[-1].split(",")[2])
    assert json.loads((trained / "training.json").read_text())["images"] == rows["retrain"]["n_r"]


def without_costs(folder):
    rows = records(folder / "rows.csv")
    return [{key: value for key, value in row.items() if key not in COSTS} for row in rows]


def test_run_again_measures_nothing_twice_and_a_lost_cell_comes_out_the_same(folder, monkeypatch):
    before, asked = without_costs(folder), []
    monkeypatch.setattr(
        kd, "measure", lambda *args, **given: asked.append(args) or kd_measure(*args, **given)
    )
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_classifier", lambda *args, **kwargs: asked.append("training"))
        kd.run_kd("digits", "allcnn-narrow", METHODS, ["3"], output=folder, **SMALL)
    assert asked == []
    assert without_costs(folder) == before
    (lost,) = [cell for cell in ClassesConfig.read(folder).cells(folder) if cell.method == "more"]
    lost.path.unlink()
    kd.run_kd("digits", "allcnn-narrow", METHODS, ["3"], output=folder, **SMALL)
    assert len(asked) == 4  # more, reloaded, inverted, three passes
    assert without_costs(folder) == before  # routing draws from seeds, not from the process


kd_measure = kd.measure


def test_a_folder_refuses_what_contradicts_it(folder):
    asked = ("digits", "allcnn-narrow", ["esc"], "3")
    with pytest.raises(BenchmarkError, match="another configuration .*evaluation: probe_seeds"):
        kd.run_kd(*asked, output=folder, epochs=3, probe_seeds=7)
    with pytest.raises(BenchmarkError, match="methods: esc: percent is"):
        kd.run_kd(*asked, output=folder, tuned={"esc": {"percent": 9}}, **SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["forget-it"]}, "There is no method 'forget-it' that forgets classes"),
        ({"forget": "11"}, "digits has no class 11"),
        ({"seeds": 0}, "Needs at least one seed and one probe seed, got 0 and 5"),
        ({"settings": {"num_expert": 3}}, "No method among esc, more takes `num_expert`"),
        ({"tuned": {"esc": {"lr": 1}}}, "esc takes no `lr`"),
        ({"dataset": "mnist"}, "There is no data set 'mnist'"),
        ({"model": "allcnn-wide"}, ""),
    ],
)
def test_refusals_before_anything_is_written(options, message, tmp_path):
    asked = {"dataset": "digits", "model": "allcnn-narrow", "methods": ["esc", "more"], "forget": "3"}
    with pytest.raises((ValueError, OSError), match=message):
        kd.run_kd(**{**asked, **options}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_by_name_number_and_together(data):
    assert kd.classes_of("3", data) == (3,)
    assert kd.classes_of("3+5", data) == (3, 5)
    named = copy.copy(data)
    object.__setattr__(named, "class_names", ("a+b", "c", *map(str, range(2, 10))))
    assert kd.classes_of("a+b", named) == (0,)  # a name comes before its parts
    assert kd.classes_of("c+4", named) == (1, 4)


def test_folder_names_are_short_and_differ():
    assert training.without("crane/bird", 2) == "without-crane_bird-seed2"
    many = ["+".join(map(str, range(first, 1000, 10))) for first in (3, 4)]
    names = {training.without(entry, 0) for entry in many}
    assert len(names) == 2
    assert max(map(len, names)) < 100


def test_settings_are_defaults_then_asked_then_tuned():
    functions = {name: CLASSIFICATION[name].load() for name in ("more", "remap", "retrain")}
    settings = kd.settings_of(
        functions, {"num_experts": 4, "solver": "pinv"}, {"more": {"solver": "covariance"}}, {}
    )
    assert settings["more"] == {
        "remap_to": "remain", "num_experts": 4, "router": "random", "solver": "covariance", "batch_size": 500
    }  # fmt: skip
    # One expert is its definition; committed configurations record none, and are joined.
    assert settings["remap"]["num_experts"] is None
    committed = Path(__file__).parents[3] / "benchmarks" / "kd" / "fashion-mnist-allcnn"
    assert ClassesConfig.read(committed).methods["remap"] == kd.settings_of(functions, {}, {}, {})["remap"]
    assert "num_experts" not in kd.arguments(settings["remap"])
    assert kd.arguments(settings["more"])["num_experts"] == 4
    assert "fit" not in settings["retrain"]


def test_a_method_of_ones_own_may_take_anything():
    def own(model, splits, *, seed=0, strength=1.0, **kwargs):
        return model.eval()

    assert kd.settings_of({"own": own}, {}, {"own": {"strength": 2.0}}, {}) == {"own": {"strength": 2.0}}


def test_cells_keep_their_names():
    """A committed folder is continued: its configuration gives the names of its cells."""
    folder = Path(__file__).parents[3] / "benchmarks" / "kd" / "fashion-mnist-allcnn"
    config = ClassesConfig.read(folder)
    assert config.to_dict() == json.loads((folder / "config.json").read_text())
    cells = config.cells(folder)
    assert len(cells) == 3 * 10 * 10
    names = {(cell.method, cell.forget, cell.seed): cell.path.name for cell in cells}
    assert names["original", "T-shirt or top", 0] == "3ce6726304b34336.json"
    assert names["more-hash", "ankle boot", 2] == "f9c2b41c1756c8c9.json"


# features


@pytest.fixture(scope="module")
def edited(original, data):
    """With random routing over nine experts; cached beside the original."""
    parts = {"train": data.train, "test": data.test}
    routed = CLASSIFICATION["more"].load()(copy.deepcopy(original), split_by_class(data, [3]))
    return cache(original, original.classifier, parts), cache(routed, routed.classifier, parts)


def test_cached_features_are_the_models(data, original, edited):
    plain, routed = edited
    assert torch.allclose(plain.features("test"), head_inputs(original, data.test), atol=1e-5)
    assert torch.equal(routed.inputs["test"], plain.inputs["test"])  # the hook comes after the cache
    assert not plain.is_random
    assert routed.is_random
    assert plain.experts("test") is None


def test_draws_are_the_remaps_experts_and_their_mean_is_the_mean_expert(edited):
    plain, routed = edited
    z, remap = plain.features("test"), get_erasure(routed.model).remap
    experts = routed.experts("test")
    assert len(experts.unique()) == remap.num_experts == 9
    assert torch.allclose(routed.features("test"), remap.apply(z, experts), atol=1e-3)
    first, again, other = (routed.features("test", draw=draw) for draw in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    mean = remap.apply(z)
    errors = [(routed.features("test", passes=passes) - mean).norm().item() for passes in (1, 16, 256)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # like 1/√passes
    logits = torch.nn.functional.linear(first, routed.head.weight, routed.head.bias)
    assert torch.allclose(routed.logits("test"), logits, atol=1e-4)


def test_routing_at_an_inner_module_is_drawn_once_from_fixed_seeds(data, original):
    routed = CLASSIFICATION["more-inner"].load()(
        copy.deepcopy(original), split_by_class(data, [3]), at="features.6"
    )
    head, parts = routed.classifier, {"test": data.test}
    once, again = (cache(routed, head, parts, batch_size=size) for size in (500, 100))
    assert torch.allclose(once.features("test"), again.features("test"), atol=1e-4)
    # the control: the hook itself draws
    assert not torch.allclose(head_inputs(routed, data.test), head_inputs(routed, data.test), atol=1e-4)
    assert not once.is_random
    assert once.experts("test") is None
    assert torch.allclose(once.features("test", passes=3, draw=1), once.features("test"), atol=1e-5)


def test_load_counts_experts_that_nobody_takes(data, original):
    routed = CLASSIFICATION["more-prototype"].load()(copy.deepcopy(original), split_by_class(data, [3]))
    get_erasure(routed).hook.router.weight.zero_()  # a tie: the first expert takes everything
    parts, places = {"train": data.train, "test": data.test}, kd.Places.of(data, split_by_class(data, [3]))
    cached, plain = cache(routed, routed.classifier, parts), cache(original, original.classifier, parts)
    means = class_means(plain.features("train"), data.train.labels, 10)
    settings = {"forget": [3], "targets": [], "original": plain, "retrained": None, "original_means": means}
    found = kd_measure(cached, places, **settings, probe_seeds=[0], shared=measuring.Shared())
    assert found.row["load_cv"] == pytest.approx(8**0.5)  # of nine experts


def test_a_baseline_that_diverges_does_not_stop_the_others(folder, tmp_path, caplog):
    run = {"models": folder / "models", "output": tmp_path, **SMALL}
    summary = kd.run_kd(
        "digits", "allcnn-narrow", ["original", "scrub", "esc"], ["3"], tuned={"scrub": {"lr": 1e6}}, **run
    )
    assert [line["method"] for line in summary] == ["original", "esc"]
    assert "scrub without 3, seed 0, is left out. After scrub" in caplog.text


def test_what_is_shared_is_not_found_again(folder, tmp_path, monkeypatch):
    trained, collected, shared = [], [], measuring.Shared()
    monkeypatch.setattr(kd, "cache", lambda *args, **given: collected.append(args) or cache(*args, **given))

    def counting(*args, **given):
        trained.append(args)
        return sgd_probes(*args, **given)

    monkeypatch.setattr(measuring, "sgd_probes", counting)
    for name in ("first", "second"):
        settings = {"models": folder / "models", "output": tmp_path / name, "shared": shared, **SMALL}
        kd.run_kd("digits", "allcnn-narrow", ["original", "remap"], ["3", "5"], **settings)
        assert len(trained) == 3  # original with both reloaded, two remapped
        assert len(collected) == 1
    expected = [row for row in without_costs(folder) if row["method"] in ("original", "remap")]
    mine = [row for row in without_costs(tmp_path / "second") if row["forget"] == "3"]
    mine = [row for row in mine if not row["method"].endswith("reloaded")]
    # no Retrain was run here
    empty = {"cka_retrain_f": None, "cka_retrain_r": None, "idi": None}
    assert mine == [{**row, **empty} for row in expected]


def test_chunks_change_nothing(edited, monkeypatch):
    whole = edited[1].features("test", passes=2, draw=3)
    monkeypatch.setattr("more_hf_bench.classes.features.CHUNK", 100)
    assert torch.allclose(edited[1].features("test", passes=2, draw=3), whole, atol=1e-5)


def test_same_backbone_sees_weights_statistics_and_hooks(original, edited):
    assert same_backbone(edited[1].model, original, "classifier")
    for change in ("features.0.0.weight", "features.0.1.running_mean"):
        other = copy.deepcopy(original)
        other.state_dict()[change].add_(1e-3)
        assert not same_backbone(other, original, "classifier")
    hooked = copy.deepcopy(original)
    hooked.features.register_forward_hook(lambda module, args, output: 2 * output)
    assert not same_backbone(hooked, original, "classifier")


# summary and outputs


def row(method="more", forget="3", seed=0, acc_f=50.0, **numbers):
    empty = {column.name: None for column in NUMBERS}
    for group in ("", "kr_", "kr_converged_"):
        empty |= {f"{group}acc_{name}": 100.0 for name in ("f", "r", "ft", "rt")}
        empty |= {f"{group}hm": 0.0, f"{group}hm_t": 0.0}
    counts = {"n_f": 100, "n_r": 900, "n_ft": 10, "n_rt": 90}
    key = {"method": method, "forget": forget, "seed": seed, "sent_to": ""}
    return {**empty, **key, **counts, "acc_f": acc_f, **numbers}


def test_summary_by_hand():
    rows = [
        row(acc_f=0.0, mia_loss=1.0),
        row(seed=1, acc_f=100.0, mia_loss=None),
        row(forget="5", acc_f=20.0, mia_loss=None),
        row("esc", mia_loss=None),
    ]
    lines = {(line["method"], line["forget"]): line for line in summarise(pd.DataFrame(rows))}
    assert list(lines) == [("more", "3"), ("more", "5"), ("esc", "3"), ("more", "all")]
    both = lines["more", "3"]
    assert (both["acc_f"], both["mia_loss"], both["seeds"], both["n_f"]) == (50, 1, 2, 100)
    assert (both["acc_f_low"], both["acc_f_high"]) == (0, 100)  # two points and nothing between
    assert lines["more", "all"]["acc_f"] == pytest.approx(40)
    assert lines["more", "5"]["mia_loss"] is None
    single = lines["esc", "3"]  # one run: the interval is the binomial's
    assert single["acc_f_low"] == pytest.approx(
        100 * np.quantile(np.random.default_rng(1).binomial(100, 0.5, 50_000), 0.025) / 100, abs=1
    )
    assert single["acc_f_high"] == pytest.approx(60, abs=1)
    assert single["hm_low"] > 0  # of 100 − acc_f and acc_r in the same draws


def test_nothing_is_reported_without_rows(tmp_path, folder):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(BenchmarkError, match="has neither cells nor rows.csv"):
        rebuilt(tmp_path)
    (tmp_path / "cells").mkdir()
    with pytest.raises(BenchmarkError, match="has no completed result yet"):
        rebuilt(tmp_path)


def test_command_line(folder, tmp_path, capsys):
    file = tmp_path / "bench.json"
    file.write_text('{"probe_seeds": 1, "tuned": {"esc": {"percent": 5}}}')
    output = tmp_path / "out"
    command = f"bench kd --dataset digits --methods esc --forget 3 5+6 --epochs 3 --config {file}"
    command += f" --models {folder / 'models'} --output {output}"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert f"Open {output / 'report.html'}" in printed
    config = json.loads((output / "config.json").read_text())
    assert config["methods"]["esc"]["percent"] == 5
    assert config["forget"] == {"3": ["3"], "5+6": ["5", "6"]}
    table = (output / "table.md").read_text()
    assert "means over all" in table
    assert "## Every erasure" in table
    assert rows_of(output)["esc"]["cka_retrain_f"] is None
    # cosines need the original's means
    assert {path.name for path in (output / "plots").iterdir()} == {"tsne.png", "cost.png"}
    assert not (output / "models").exists()
    assert main(["bench", "kd", "--methods", "nothing", "--forget", "3", "--output", str(output)]) == 2
    assert "There is no method 'nothing'" in capsys.readouterr().err
