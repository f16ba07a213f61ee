"""Every row of a report has its line in the glossary, and no sentence claims what was not done."""

import itertools
from pathlib import Path

import pytest
from support.records import read_record

import more_hf
from more_hf.core import claims
from more_hf.core.record import Record
from more_hf.core.report import PAGE, explained
from more_hf.saving.card import make_card


ROOT = Path(more_hf.__file__).parents[1]
TARGET = "claude monet"
CASES = {
    "exact": {"concepts": "van gogh", "remap_to": TARGET},
    "nothing": {"concepts": "van gogh", "remap_to": None},
    "mixed": {
        "concepts": ["van gogh", "cat"],
        "remap_to": {"van gogh": TARGET, "cat": None},
        "solver": "covariance",
    },
    "soft": {"concepts": ["van gogh", "cat"], "remap_to": TARGET, "solver": "soft", "softness": 4.0},
    "scaled": {"concepts": "van gogh", "remap_to": TARGET, "strength": 0.7},
    "router": {"concepts": "van gogh", "remap_to": [TARGET, "dog"], "router": "random", "retain": ["cat"]},
}
INSIDE = {"reach": "denoiser", "pictures": 2, "sampling": {"num_inference_steps": 2, "height": 8, "width": 8}}


@pytest.fixture(scope="module")
def erased():
    from support.pipelines import build_tiny_sd

    found = {}
    for name, options in CASES.items():
        found[name] = more_hf.erase_concept(build_tiny_sd(), **options)
    return found


def said(pipe):
    return "\n".join(claim.sentence for claim in more_hf.get_erasure(pipe).claims())


def test_what_is_said_is_what_was_done(erased):
    expected = {"exact": [claims.EXACT], "nothing": [claims.NOTHING], "router": [claims.EXACT]}
    expected |= {"mixed": [claims.EXACT, claims.NOTHING], "soft": [claims.SOFT]}
    expected["scaled"] = [claims.SCALED.format(0.7)]
    for name, pipe in erased.items():
        scaled = claims.SCALED.format(0.7)
        for sentence in (claims.EXACT, claims.NOTHING, claims.SOFT, claims.INSIDE, scaled):
            assert (sentence in said(pipe)) == (sentence in expected[name]), (name, sentence)
        assert claims.RUN in said(pipe)
    left = more_hf.get_erasure(erased["soft"]).guarantees["way_left"]
    assert f"{100 * left:.2g} % of the way is left" in said(erased["soft"])
    assert left > 0.01


@pytest.mark.parametrize("name", CASES)
def test_report_card_and_verify_say_the_same(erased, name, tmp_path):
    folder = more_hf.save(erased[name], tmp_path / "erased")
    card = make_card(Record.read(folder), "me/model")
    report = str(more_hf.get_erasure(erased[name]))
    for claim in more_hf.get_erasure(erased[name]).claims():
        assert claim.sentence in card
        assert " ".join(claim.sentence.split()[:4]) in " ".join(report.split())
    checks = [check.name for check in more_hf.verify(folder).checks]
    others = {
        "nothing": "each sends p_f to zero",
        "soft": "each sends p_f most of the way",
        "scaled": "each sends p_f 0.7 of the way",
    }
    assert others.get(name, "each sends p_f where p_t goes") in checks
    assert ("To rounding" in card) == (name not in ("soft", "scaled"))


@pytest.mark.slow
def test_layers_inside_are_said_to_be_compared_by_their_fingerprint(tiny_sd, tmp_path):
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to=TARGET, **INSIDE)
    folder = more_hf.save(pipe, tmp_path / "erased")
    assert claims.INSIDE in said(pipe)
    inside = len(more_hf.get_erasure(pipe).sites) - len(read_record(folder)["sites"])
    found = {check.name: check.finding for check in more_hf.verify(folder).checks}
    assert "fingerprint alone" in found["those inside the denoiser are the saved ones"]
    assert "against the fingerprint of what was saved alone" in make_card(Record.read(folder), "me/model")
    assert not inside


def rows_of(pipes):
    erasures = map(more_hf.get_erasure, pipes)
    return set(itertools.chain.from_iterable((name for name, _ in erasure.rows()) for erasure in erasures))


def test_every_row_has_its_line(erased, model, loader):
    more_hf.erase_classes(model, loader, forget=["four"], router="random")
    names = rows_of([*erased.values(), model])
    assert len(names) > 20
    for name in names:
        assert len(explained([name]).splitlines()) == 3, name
    assert len(explained(["something new"]).splitlines()) == 2
    inside = [f"measured `denoiser_{name}`" for name in ("way_left", "ordinary_moved")]
    assert explained(inside).count("\n") == 3
    erasure = more_hf.get_erasure(model)
    assert len(erasure.explain().splitlines()) == len({name for name, _ in erasure.rows()}) + 2


def test_the_page_and_the_report_name_each_other(erased):
    assert "more_hf/report.md" in str(more_hf.get_erasure(erased["exact"]))
    assert "(more_hf/report.md)" in (ROOT / "README.md").read_text("utf-8")
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    assert all(line.count("|") == 6 for line in rows)


@pytest.mark.parametrize("sentence", ["EXACT", "SOFT", "RUN"])
def test_the_readme_has_the_same_sentences(sentence):
    assert getattr(claims, sentence) in (ROOT / "README.md").read_text("utf-8")
