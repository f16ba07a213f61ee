"""The tables of benchmarks/kd: who misses, by hand; which rows are put side by side."""

import importlib.util
import itertools
from pathlib import Path

import pandas as pd
import pytest

from more_hf_bench.classes.summary import NUMBERS, summarise


KD = Path(__file__).parents[3] / "benchmarks" / "kd"
SPLITS = ("f", "r", "ft", "rt")


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("kd_tables", KD / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method, forget="a", seed=0, acc_ft=0.0, acc_rt=90.0, **numbers):
    empty = {column.name: None for column in NUMBERS}
    for group in ("", "kr_", "kr_converged_"):
        empty |= {f"{group}{name}": 50.0 for name in ("acc_f", "acc_r", "acc_ft", "acc_rt", "hm", "hm_t")}
    empty |= {"kr_converged_auc_rest": 50.0, **{f"n_{split}": 10 for split in SPLITS}, "seconds": 1.0}
    key = {"method": method, "forget": forget, "seed": seed, "sent_to": ""}
    hm_t = 2 * (100 - acc_ft) * acc_rt / (100 - acc_ft + acc_rt)
    return {**empty, **key, "acc_ft": acc_ft, "acc_rt": acc_rt, "hm_t": hm_t, **numbers}


def test_misses_by_hand(tables):
    rows = [row("original", acc_ft=90), row("original", forget="b", acc_ft=90, acc_rt=95)]
    rows += [
        row("remap", acc_rt=89.5),
        row("remap", forget="b", acc_rt=94.49),
        row("more-x16", acc_ft=0.5),
        row("more-hash", acc_ft=0.6),
    ]
    rows += [row("erase", acc_rt=0), row("remap-without-po", acc_rt=0)]  # not judged
    assert [(line["method"], line["forget"]) for line in tables.misses(pd.DataFrame(rows))] == [
        ("remap", "b"),
        ("more-hash", "a"),
    ]
    found = {line["method"]: line for line in tables.kept(pd.DataFrame(rows))}
    assert [line["misses"] for line in found.values()] == [1, 0, 1]
    assert found["remap"]["most acc_rt lost"] == "0.51"
    assert found["more-hash"]["largest acc_ft"] == "0.60"
    by_class = {"forget": "b", "remap": "1 of 1 (0.5, 0.0)", "more-x16": "", "more-hash": ""}
    assert tables.by_class(pd.DataFrame(rows))[1] == by_class
    assert tables.misses(pd.DataFrame(rows[:3]))[0]["method"] == "none"


def test_the_same_classes_and_seeds_side_by_side(tables):
    cells = itertools.product(("original", "more-x16", "esc"), "ab", (0, 1))
    closed = [row(*cell) for cell in cells]
    trained = [
        row(name, "a", acc_rt=acc)
        for name, acc in (("original", 80), ("finetune", 70), ("salun", 60), ("scrub", 50), ("lau", 40))
    ]
    trained.append(row("original", "b"))  # b was not run with the others
    both = tables.together(pd.DataFrame(closed), pd.DataFrame(trained))
    assert set(zip(both["forget"], both["seed"], strict=True)) == {("a", 0)}
    assert both["method"].tolist() == "original finetune salun scrub lau esc more-x16".split()
    assert both["acc_rt"].iloc[0] == 80  # the second folder's own
    short = [line["method"] for line in tables.short(both)]
    assert short == "original finetune salun scrub esc more-x16".split()


def test_every_seed_is_told(tables):
    rows = [
        row("esc", forget, seed, acc_ft=10 * seed + (forget == "b")) for seed in (0, 1) for forget in "ab"
    ]
    (line,) = tables.every_seed(pd.DataFrame(rows))
    assert line["acc_ft"] == "0.50 / 10.50"


@pytest.mark.slow
def test_the_tables_are_those_of_the_rows(tables, monkeypatch):
    committed = {path.name: path.read_text("utf-8") for path in (KD / "tables").iterdir()}
    written = {}
    monkeypatch.setattr(tables, "write_text", lambda path, text: written.setdefault(path.name, text))
    tables.main()
    assert written == committed


def test_the_share_of_the_way_to_retrain_by_hand():
    def found(method, percent, forget="a"):
        return row(method, forget=forget, kr_converged_acc_ft=percent)

    rows = [found("original", 90), found("retrain", 80), found("esc", 85), found("remap", 40)]
    # nothing to close, and no Retrain
    rows += [found("original", 80, "b"), found("retrain", 79.5, "b"), found("esc", 60, "b")]
    rows += [found("original", 80, "c"), found("esc", 60, "c")]
    closed = {(line["method"], line["forget"]): line["gap_closed"] for line in summarise(pd.DataFrame(rows))}
    assert [closed[method, "a"] for method in ("original", "retrain", "esc", "remap")] == [0, 100, 50, 500]
    assert closed["esc", "b"] is None
    assert closed["esc", "c"] is None


def test_the_representation_score_by_hand():
    def found(seed, own, others, **retrain):
        return row("esc", seed=seed, cka_original_f=own, cka_original_r=others, **retrain)

    theirs = {"cka_retrain_f": 0.5, "cka_retrain_r": 1.0}
    rows = pd.DataFrame([found(0, 0.2, 0.8, **theirs), found(1, 1.0, 1.0, **theirs)])
    (line,) = summarise(rows)
    assert line["rus_original"] == pytest.approx(0.4)  # of 0.8, and of 0 where nothing was forgotten
    assert line["rus_retrain"] == pytest.approx(2 / 3)
