"""A study on a pipeline whose pictures a painter paints, by what its weights say a prompt names."""

import errno
import json

import pytest
import torch
from support.compare import state
from support.judges import build_tiny_clip

import more_hf
from more_hf.core.errors import (
    ExportError,
    IncompatibleBaseError,
    MoreError,
    PrototypeError,
    SiteNotFoundError,
)
from more_hf.diffusion.sites import find_denoiser, find_sites
from more_hf.tuning import study as study_module
from more_hf.tuning.candidates import find_candidates, find_nameless, kind_of, looks_made_up, packaged_names
from more_hf.tuning.clip import Clip, JudgeError
from more_hf.tuning.judge import Estimate
from more_hf.tuning.search import Figures, Trial, Workshop, front
from more_hf.tuning.study import Study


SENTENCES = ["a fox in the style of {}", "a crab by {}", "a pizza in the style of {}", "a bus by {}"]
ASKED = {"candidates": ["Fluent", "Twemoji"], "sentences": SENTENCES, "pictures": 16, "batch_size": 8}


def test_one_word_in_and_a_choice_of_edits_out(pipe, painter, tmp_path):
    before = state(pipe.unet)
    study = more_hf.tune(pipe, "Noto", **ASKED)
    assert all(torch.equal(before[name], weight) for name, weight in state(pipe.unet).items())
    assert more_hf.get_erasure(pipe) is None
    # the judge tells the colors apart, and after the edit nothing is painted in the concept's
    best = study.choices[0]
    assert study.judge["found"].value == 1
    assert best.figures.recognized.value == 0
    assert best.figures.kept.value == 1
    assert best.figures.changed.value > 5 * best.figures.moved
    assert best.request.targets[0] in ASKED["candidates"]
    # and none of it is left from some strength on
    at = [estimate.value for estimate in study.strengths.values()]
    assert list(study.strengths) == ["0", "0.25", "0.5", "0.75", "1", "1.25"]
    assert at[0] == 1
    assert at == sorted(at, reverse=True)
    assert at[-1] == 0
    assert f"1, {best.label}" in str(study)
    # what was saved says the same
    loaded = Study.load(study.save(tmp_path / "study"))
    assert str(loaded) == str(study)
    for name in ("setup", "chances", "choices", "strengths", "judgments"):
        assert getattr(loaded, name) == getattr(study, name)
    assert loaded.sheet.size == study.sheet.size
    # the proven erasure has the weights of the trial
    workshop = Workshop(pipe, study.setup)
    with workshop.edited(workshop.edit(best.request.targets[0])):
        tried = state(pipe.unet)
    loaded.erase(pipe)
    erased = state(pipe.unet)
    assert all(torch.allclose(tried[name], erased[name], atol=1e-6) for name in tried)
    assert any(not torch.equal(before[name], erased[name]) for name in tried)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.request == best.request
    assert erasure.facts.study[0] == {**study.rows()[0], "chosen": "yes"}
    assert erasure.facts.judged == study.judged
    more_hf.restore(pipe)
    eval(best.call, {"more_hf": more_hf, "pipe": pipe})
    assert more_hf.get_erasure(pipe).request == best.request


@pytest.mark.slow
def test_clip_answers_beside_the_judge(pipe, painter, tmp_path, monkeypatch):
    """A real CLIP at a tiny size; its answers are those of the cosines, and they decide nothing."""
    clip = Clip(*build_tiny_clip())
    monkeypatch.setattr(Clip, "load", lambda: clip)
    alone, study = more_hf.tune(pipe, "Noto", **ASKED), more_hf.tune(pipe, "Noto", **ASKED, judge="clip")
    assert [choice.label for choice in study.choices] == [choice.label for choice in alone.choices]
    found = []
    for number in range(16):
        prompts = [SENTENCES[number % 4].replace("{}", name) for name in ("Noto", "Fluent", "Twemoji")]
        (z,) = clip.embed(painter(pipe, prompts[:1], [number], {}))
        found.append(max(range(3), key=lambda i: float(clip.encode(prompts[i : i + 1]) @ z)) == 0)
    assert study.judge["clip"] == Estimate.share(sum(found), 16)
    assert study.judge["clip"] != study.judge["found"]  # random weights see nothing
    own = [judgment for judgment in study.judgments if judgment.edit == study.choices[0].label]
    by_clip = [judgment.clip for judgment in own if judgment.role == "concept"]
    assert study.choices[0].figures.clip == Estimate.share(sum(by_clip), 16)
    assert "| by CLIP" in str(study)
    assert "CLIP" not in str(alone)
    assert Study.load(study.save(tmp_path)).choices == study.choices


def test_without_clips_weights_nothing_is_drawn(pipe, painter, monkeypatch):
    load = Clip.load
    monkeypatch.setattr(Clip, "load", lambda: load(model="nothing"))
    with pytest.raises(JudgeError, match="or run without it"):
        more_hf.tune(pipe, "Noto", **ASKED, judge="clip")
    assert painter.drawn == 0


@pytest.mark.slow
def test_aliases_go_with_the_concept(pipe, painter):
    words = ["famous Noto", "a rainy day", "Fluent"]
    study = more_hf.tune(pipe, "Noto", **{**ASKED, "aliases": words})
    assert study.setup.aliases == ("famous Noto",)
    assert study.choices[0].request.concepts == {"Noto": ("famous Noto",)}
    assert "{'Noto': ['famous Noto']}" in study.choices[0].call


@pytest.mark.slow
@pytest.mark.parametrize("stops_at", [20, 75, 90])
def test_killed_at_any_moment_it_goes_on(pipe, painter, tmp_path, stops_at):
    before, whole = state(pipe.unet), more_hf.tune(pipe, "Noto", **ASKED)
    needed, painter.drawn, painter.stops_at = painter.drawn, 0, stops_at
    with pytest.raises(KeyboardInterrupt):
        more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)
    assert all(torch.equal(before[name], weight) for name, weight in state(pipe.unet).items())
    file = tmp_path / "judgments.jsonl"
    file.write_text(file.read_text() + '{"edit": "to Fl')  # a line that was cut off
    with pytest.raises(MoreError, match="has not ended"):
        Study.load(tmp_path)
    painter.stops_at = None
    resumed = more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)
    assert str(resumed) == str(whole)
    # of what was drawn, at most a batch and the original's pictures were drawn again
    assert painter.drawn <= needed + 8 + (stops_at < 66) * stops_at
    painter.drawn = 0
    assert str(more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)) == str(whole)
    assert painter.drawn < 40  # the sheet alone


@pytest.mark.slow
def test_a_full_disk(pipe, painter, tmp_path, monkeypatch):
    before, real = state(pipe.unet), study_module._line

    def full(judgment):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(study_module, "_line", full)
    with pytest.raises(ExportError, match="No space left on device.*make room"):
        more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)
    assert all(torch.equal(before[name], weight) for name, weight in state(pipe.unet).items())
    monkeypatch.setattr(study_module, "_line", real)
    assert more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED).choices


@pytest.mark.slow
def test_the_study_of_something_else_is_refused(pipe, painter, tmp_path):
    study = more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)
    with pytest.raises(MoreError, match="another concept: 'Noto' there, 'Fluent' here"):
        more_hf.tune(pipe, "Fluent", folder=tmp_path, **{**ASKED, "candidates": ["Noto", "Twemoji"]})
    with pytest.raises(MoreError, match="another pictures"):
        more_hf.tune(pipe, "Noto", folder=tmp_path, **{**ASKED, "pictures": 20})
    head = json.loads((tmp_path / "study.json").read_text())
    head["model"]["version"] = "0.0.1"
    (tmp_path / "study.json").write_text(json.dumps(head))
    with pytest.raises(MoreError, match=r"another version: '0\.0\.1' there"):
        more_hf.tune(pipe, "Noto", folder=tmp_path, **ASKED)
    site = next(iter(find_sites(pipe, find_denoiser(pipe)).values()))
    site.write(2 * site.read())
    with pytest.raises(IncompatibleBaseError, match="Load the model as it was studied"):
        study.erase(pipe)
    with pytest.raises(MoreError, match="There is no choice 9"):
        study.erase(pipe, 9)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(MoreError, match=r"is no study of `more_hf\.tune`"):
        Study.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no study"):
        Study.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"candidates": ["Fluent", "noto"]}, "both the concept and in `candidates`"),
        ({"candidates": ["Fluent", "famous Noto"], "aliases": ["famous Noto"]}, "an alias of 'Noto'"),
        ({"candidates": ["Fluent"]}, "a choice needs at least 2"),
        ({"candidates": ["Fluent", "the artist Noto"]}, "contains 'Noto'"),
        ({"sentences": ["a fox by {}"]}, "`sentences` must be 2 to 8"),
        ({"sentences": ["a fox", "a crab"]}, "each with `{}` for a name"),
        ({"pictures": 8}, "`pictures` must be at least 16"),
        ({"reach": "far"}, "Unknown reach"),
        ({"judge": "me"}, "Unknown judge"),
    ],
)
def test_wrong_arguments(pipe, painter, changed, message):
    with pytest.raises(PrototypeError, match=message):
        more_hf.tune(pipe, "Noto", **{**ASKED, **changed})
    assert painter.drawn == 0


@pytest.mark.slow
def test_what_cannot_be_tuned(pipe, painter):
    # a model that does not know the name draws something else
    painter.colors["Noto"] = painter.colors["Fluent"]
    with pytest.raises(MoreError, match="The judge cannot tell 'Noto' from 2 other names"):
        more_hf.tune(pipe, "Noto", **ASKED)
    assert painter.drawn == 4 * 16 + 2  # and nothing is searched
    more_hf.erase_concept(pipe, "Noto", remap_to="Fluent")
    with pytest.raises(MoreError, match="Restore it first"):
        more_hf.tune(pipe, "Twemoji", **{**ASKED, "candidates": ["Fluent", "Monotone"]})


@pytest.mark.slow
def test_a_name_that_changes_nothing_is_warned_of(pipe, painter, caplog):
    assert more_hf.tune(pipe, "Noto", **ASKED).chances["drawn"] < 0.001
    assert "may not know" not in caplog.text
    painter.colors["Noto"] = painter.colors[""]
    study = more_hf.tune(pipe, "Noto", **ASKED)
    assert study.chances["drawn"] == 1
    for text in (caplog.text, study.judged):  # and so on the card
        assert "The model may not know 'Noto'" in text


def test_a_made_up_word_is_warned_of(pipe, caplog):
    assert [looks_made_up(pipe, name) for name in ("zxqv", "famous Blobmoji", "cow face")] == [
        True,
        False,
        False,
    ]
    with pytest.raises(PrototypeError):  # later
        more_hf.tune(pipe, "zxqv", candidates=["Fluent"])
    assert "no word of 'zxqv' whole" in caplog.text


@pytest.mark.slow
def test_a_pipeline_that_cannot_draw(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(SiteNotFoundError, match="cannot draw from a prompt"):
        more_hf.tune(other, "Noto", **ASKED)


def test_names_by_kind(pipe):
    assert kind_of(pipe, "blobmoji") == "artists"
    assert kind_of(pipe, "famous Blobmoji") == "artists"  # the nearest name's
    assert kind_of(pipe, "cow face") == "animals"
    names = find_candidates(pipe, "fire", "signs", None)
    assert "red heart" in names
    assert "fire" not in names
    assert "fire engine" not in find_candidates(pipe, "fire", "vehicles", None)
    nameless = find_nameless(pipe, ["fox"], 30)
    assert len(nameless) == 30
    artists = packaged_names(True)["artists"]
    assert not [line for line in nameless if "fox" in line or any(name in line for name in artists)]


def figures(recognized, changed, moved=0.01, kept=1.0, half=0.01):
    values = {
        "recognized": recognized,
        "kept": kept,
        "changed": changed,
        "retained": moved,
        "nameless": moved,
    }
    estimates = {name: Estimate(value, value - half, value + half, 24) for name, value in values.items()}
    return Figures(**estimates, lost=1 - kept)


def test_the_front_has_what_nothing_beats():
    good, far, less = figures(0.0, 0.3), figures(0.1, 0.4), figures(0.0, 0.2)
    noise = figures(0.0, 0.295)  # worse, within its interval
    trials = [Trial(None, each) for each in (good, far, noise, less, figures(0.1, 0.4, kept=0.9))]
    assert [trial.figures for trial in front(trials)] == [good, far, noise]
    assert len(front([Trial(None, good)] * 9)) == 6
    assert good.score == pytest.approx(0.29)
    assert figures(0.1, 0.3, kept=0.8).score == pytest.approx(-0.01)
