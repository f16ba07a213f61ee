"""The benchmark scripts: what is timed is the published closed form, choices are made as docstrings say."""

import importlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from more_hf.cli.main import main
from more_hf.diffusion.prompts import packaged_prompts
from more_hf_bench.artists.grid import to_pil
from more_hf_bench.attacks.store import AttackConfig, Result
from more_hf_bench.attacks.tables import write_outputs
from more_hf_bench.columns import read_cells, read_rows
from more_hf_bench.errors import BenchmarkError
from more_hf_bench.methods.diffusion.closed_form import adversarial_embeddings, edit_matrix


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL_UNET = {"block_out_channels": (32,) * 4, "layers_per_block": 1}
SMALL_UNET |= {"cross_attention_dim": 32, "attention_head_dim": 2}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def script(monkeypatch):
    def load(folder, name):
        monkeypatch.syspath_prepend(str(BENCHMARKS / folder))
        return importlib.import_module(name)

    return load


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_timed_is_the_closed_form_of_the_baselines(script):
    speed = script("speed", "speed")
    layers = [features(6, 8, seed=seed) for seed in range(2)]
    C, G, R = features(3, 8, seed=5), features(3, 8, seed=6), features(4, 8, seed=7)
    scales = {"erase_scale": 1.0, "preserve_scale": 0.1}
    A = edit_matrix(C, G, R, lamb=0.5, **scales)
    one_by_one = speed.closed_form(layers, list(C.split(1)), list(G.split(1)), list(R.split(1)), 0.5, 0.1)
    assert all(torch.allclose(new, W @ A) for new, W in zip(one_by_one, layers, strict=True))
    assert not torch.allclose(one_by_one[0], layers[0], atol=1e-2)

    adversarial = adversarial_embeddings(sum(W.T @ W for W in layers), A, C, 1e-3)
    A = A @ edit_matrix(adversarial, G, R, lamb=0.1, **scales)
    edited = speed.rece(layers, C, G, [R])
    assert all(torch.allclose(new, W @ A) for new, W in zip(edited, layers, strict=True))


@pytest.mark.slow
def test_every_part_of_the_speed_table(script):
    speed = script("speed", "speed")
    unet, text = {**speed.SD14, **SMALL_UNET}, {**speed.CLIP_L, **SMALL_TEXT}
    lines = speed.measure(unet, text, 8, names=(2,), prompts=(2,))
    assert lines[0]["times the merge"] == 1
    assert [line["what"].split(",")[0] for line in lines[:4]] == [
        "more", "floor: read and write the edited matrices once", "UCE", "UCE",
    ]  # fmt: skip
    assert all(line["seconds"] >= 0 for line in lines)
    assert len(lines) == 13


def test_the_work_of_an_edit_inside_is_counted(script):
    """By hand: four blocks of width d, whose seven inputs of width d and one of 4 d have a moment each."""
    reach, d, pictures = script("paper", "reach"), 32, 2
    assert reach.operations(torch.nn.Linear(3, 5), torch.zeros(7, 3)) == 2 * 7 * 3 * 5
    unet = {"block_out_channels": (d,), "layers_per_block": 1, "cross_attention_dim": 24}
    unet |= {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet |= {"sample_size": 16, "attention_head_dim": 2}
    model = reach.Model("", lambda: reach.UNet2DConditionModel(**unet), reach.of_a_unet(24, 16), steps=10)
    work = reach.work_of(model, pictures)
    own = pictures * 6 * 64  # at six levels, 64 of 256 positions
    squares, cubes = 4 * (7 * d**2 + (4 * d) ** 2), 4 * (7 * d**3 + (4 * d) ** 3)
    assert work.moments == 2 * 8 * squares
    assert work.sums == 2 * (own + 4 * own) * squares  # twice as many ordinary pictures, and both halves
    assert work.systems == pytest.approx(cubes / 3)
    assert work.writing == 4 * 3 * 4 * 20 * d**2  # to a rank of 3, 20 d² weights in each block
    assert work.pictures / work.picture == 4 * pictures * (10 + 7) / 10
    kept = reach.work_of(model, pictures, retained=True)  # as many ordinary pictures, twice as many of names
    assert (kept.moments, kept.sums) == (3 * 8 * squares, 2 * (1 + 2 + 4) * own * squares)
    few = reach.work_of(replace(model, inputs=reach.of_a_unet(24, 2)), pictures=1)
    assert few.moments < work.moments  # four positions are fewer features than some have numbers


@pytest.mark.slow
def test_every_part_of_an_edit_inside_the_denoiser(script):
    inside = script("speed", "inside")
    unet, text = {**inside.speed.SD14, **SMALL_UNET}, {**inside.speed.CLIP_L, **SMALL_TEXT}
    *parts, whole = inside.measure(unet, text, pictures=2)
    assert len(parts) == 4
    assert sum(part["seconds"] for part in parts) == pytest.approx(whole["seconds"], abs=0.3)
    assert "draw 10 pictures" in parts[1]["what"]
    assert whole["what"].endswith("layers")


@pytest.mark.slow
def test_real_imagenet_weights_forget_the_daisy(script):
    imagenet = script("classifiers", "imagenet")
    daisy, (flower, *_) = 985, imagenet.HELD_OUT
    model = imagenet.load_model()
    z = imagenet.features(model, imagenet.views((flower,), 6, seed=0))
    before = imagenet.logits(model, z)
    assert (before.argmax(1) == daisy).double().mean() > 0.8
    seen = imagenet.features(model, imagenet.views(imagenet.SEEN, 2, seed=0))
    prototypes = imagenet.prototypes_of(model, seen)
    row = imagenet.measure(model, prototypes, z, [daisy], "pinv")

    assert row["views_forgotten"] == int((before.argmax(1) == daisy).sum())
    assert row["still_recognised"] < 50
    assert torch.equal(imagenet.logits(model, z), before)  # and what was measured was undone


@pytest.mark.slow
def test_both_forms_of_a_wide_metric_agree(script):
    lines = script("speed", "wide").measure(((64, 20, True), (90, 30, False)))
    assert [(line["width"], line["Σ"]) for line in lines] == [(64, "thin"), (64, "dense"), (90, "thin")]
    assert float(lines[1]["D_F apart"]) < 1e-9
    assert lines[1]["times the thin one's seconds"] > 0
    assert lines[0]["MiB"] >= 0


@pytest.mark.slow
@pytest.mark.usefixtures("every_ordinary_prompt")
def test_layers_of_a_model_on_the_disk(script, tmp_path, monkeypatch, capsys):
    layers_only = script("speed", "layers_only")
    alone, ran = layers_only.alone, []

    def once_alone(code, verb, *words, home):
        """Run a command in a process of its own the first time, and here from then on, which is quicker."""
        if verb not in ran:
            ran.append(verb)
            return alone(code, verb, *words, home=home)
        monkeypatch.setattr("more_hf.diffusion.kept.CACHE", home / "more_hf")
        assert main([verb, *words]) == 0
        loaded = "Loading the text encoders" in capsys.readouterr().err
        return layers_only.Run(0, 0, "loaded" if loaded else "on the disk")

    monkeypatch.setattr(layers_only, "alone", once_alone)
    loaded, first, *commands = layers_only.measure(tmp_path, layers=1, shard=10**8, width=256)
    assert loaded["beyond the text encoder"] == 0
    assert loaded["MiB at most"] > 100
    assert all(0 < line["MiB at most"] < loaded["MiB at most"] + 2048 for line in (first, commands[-1]))
    read = [line["text encoder"] for line in (first, *commands)]
    assert read == ["loaded"] * 2 + ["on the disk"] * 3
    shards = sorted((tmp_path / "qwen-image" / "transformer").glob("*.safetensors"))
    assert len(shards) > 3
    changed = []
    for shard in shards:
        before, after = load_file(shard), load_file(tmp_path / "by_erase" / "transformer" / shard.name)
        changed += [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert changed == ["txt_in.weight"]


@pytest.mark.slow
def test_an_edit_belongs_to_a_precision(script, monkeypatch):
    from support.quantized import quanto_without_compiler

    quanto_without_compiler(monkeypatch)
    few = packaged_prompts("emoji_prompts.txt")[::8]  # behind Σ
    monkeypatch.setattr("more_hf.diffusion.ordinary.everyday_prompts", lambda tokenizer: few)
    precision = script("geometry", "precision")
    committed = pd.read_csv(precision.HERE / "precision.csv")
    measured = pd.DataFrame(precision.measure(["Blobmoji", "Fluent"]))
    for lines in (measured, committed):
        own = lines["fitted with"] == lines["run with"]
        assert (lines["left"][own] < 1e-3).all()
        left = lines[lines["fitted with"] == "float32"].set_index("run with")["left"]
        assert (
            0.01 < left["float16"] < left["bfloat16"] < left["8 bits (quanto)"] < left["4 bits (quanto)"] / 5
        )
        assert left["4 bits (quanto)"] < 20


def test_the_lists_behind_the_order_of_auto_and_their_table(script, monkeypatch, tmp_path):
    order = script("artists/many/order", "order")
    for size, which in itertools.product(order.SIZES, order.LISTS):
        own = order.draw_list(size, which)
        assert len(own.targets) == size
        assert own.targets.keys().isdisjoint(own.targets.values())
        forgotten = [len(own.targets.keys() & {row.thing, row.artist}) for row in own.rows]
        assert forgotten == [1] * 20 + [0] * 16
    assert own.rows != order.draw_list(size, order.LISTS[0]).rows

    rows, committed = pd.read_csv(order.HERE / "rows.csv"), (order.HERE / "table.md").read_text()
    monkeypatch.setattr(order, "HERE", tmp_path)
    order.write_tables(rows)
    assert (tmp_path / "table.md").read_text() == committed


def test_geometry_measures_by_hand(script, monkeypatch):
    geometry = script("geometry", "geometry")
    for name, value in (("WIDTH", 24), ("OUT", 30), ("RETAINED", 4), ("ORDINARY", 400)):
        monkeypatch.setattr(geometry, name, value)
    problem = geometry.Problem(3)
    same, gone = problem.layers, [torch.zeros_like(W) for W in problem.layers]
    assert geometry.moved(problem, same, problem.R) == 0
    assert geometry.moved(problem, gone, problem.R) == pytest.approx(100)
    assert geometry.moved(problem, same, problem.C, problem.G) == pytest.approx(100)
    assert float(problem.unseen.square().sum(1).mean()) == pytest.approx(24, rel=0.2)

    lines = {method: geometry.measure(method, problem) for method in geometry.METHODS}
    for method in ("more", "more (pinv)", "more-without-po"):
        assert lines[method]["concept_to_target"] == pytest.approx(0, abs=1e-6)
    assert lines["more (pinv)"]["retained_moved"] == pytest.approx(0, abs=1e-6)
    assert lines["more-without-po"]["retained_moved"] > 1
    assert lines["more"]["ordinary_moved"] < lines["more (pinv)"]["ordinary_moved"]  # what the metric is for
    assert lines["cure"]["concept_to_target"] is None
    refused = geometry.measure("more", geometry.Problem(13))
    assert "26 prototypes do not fit into 24 dimensions" in refused["note"]
    assert refused["seconds"] is None


def test_targets_are_chosen_by_score_then_by_the_smallest_change(script, monkeypatch):
    choose = script("artists", "choose")
    monkeypatch.setattr(choose, "EMOJI_ARTISTS", tuple("ABCDE"))

    def lines(forget, **measured):
        return [
            {"forget": forget, "remap_to": name, "score": str(score), "lpips_f": str(lpips)}
            for name, (score, lpips) in measured.items()
        ]

    a = {"B": (390, 0.4), "C": (386, 0.2), "D": (399, 0.1), "E": (300, 0.5)}
    # D can hardly be seen; C is within five points of B and changes less
    assert choose.best_targets(lines("A", **a), ["A"]) == ["C", "B", "E"]
    further = {**a, "C": (385, 0.2)}
    assert choose.best_targets(lines("A", **further), ["A"]) == ["B", "C", "E"]
    b = {"A": (399, 0.5), "C": (200, 0.2), "D": (399, 0.3), "E": (390, 0.5)}
    # the mean of both, and neither itself
    assert choose.best_targets(lines("A", **a) + lines("B", **b), ["A", "B"]) == ["D", "E", "C"]


def test_a_cell_of_the_defaults_is_a_request(script):
    choose = script("artists", "choose")
    tokenizer = choose.more_hf.load_emoji_sd().tokenizer
    ranked = ["Noto", "Fluent", "Twemoji", "EmojiOne"]

    def ask(cell):
        return choose.request_for("Blobmoji", ranked, choose.FACTORS[cell], tokenizer)

    centre = ask("centre")
    asked = (centre.solver, centre.tokens, centre.retain, centre.targets)
    assert asked == ("covariance", "positions", (), ["Noto"])
    assert ask("shrinkage=1e-2").shrinkage == 1e-2
    assert ask("templates=two").templates == choose.BARE
    assert ask("sigma=1 of 4").everyday == centre.everyday[::4]
    assert ask("sigma=general").everyday == choose.packaged_prompts("everyday_prompts.txt") != centre.everyday
    assert ask("targets=3 router=hash").targets == ranked[:3]
    assert ask("remap_to=None").targets == []
    assert len(ask("solver=pinv retain=artists+things").retain) == 9 + len(choose.THINGS)


def test_the_best_two_factors_are_crossed(script):
    scores = {"centre": 400, "tokens=last": 399, "tokens=end": 398, "shrinkage=1e-3": 390}
    scores["tokens=last + solver=pinv"] = 401
    lines = [{"cell": cell, "score": str(score)} for cell, score in scores.items()]
    assert script("artists", "choose").best_two(lines) == ["tokens=last", "shrinkage=1e-3"]


def test_folding_edits_all_that_is_added_to_the_residual_stream(script):
    """Every writer gives E times what it gave before, the stream in front of the first block, too."""
    deeper = script("kd", "deeper")
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4)).eval()
    torch.nn.init.normal_(model.vit.layers[0].mlp.fc2.bias)  # zero in a new model
    E, z, pixels = features(8, 8), torch.randn(5, 8), torch.randn(2, 3, 8, 8)
    images = SimpleNamespace(loader=lambda batch_size: [{"pixel_values": pixels}])
    remaps = []

    def remap(stream):
        remaps.append(stream)
        return SimpleNamespace(apply=lambda rows: (rows.double() @ E.T).to(rows.dtype))

    def written():
        layer = model.vit.layers[0]
        hidden = torch.cat([z, z[:, :4]], 1)
        with torch.no_grad():
            return [model.vit.embeddings(pixels), layer.attention.o_proj(z), layer.mlp.fc2(hidden)]

    before = written()
    deeper.fold(SimpleNamespace(remap=remap, images=images), model, rounds=2)
    for old, new in zip(before, written(), strict=True):
        torch.testing.assert_close(new, (old.double() @ E.T @ E.T).float(), rtol=1e-4, atol=1e-4)
    # Each round is fitted on the class token that it finds.
    assert [stream.shape for stream in remaps] == [(2, 1, 8)] * 2
    assert not torch.allclose(*remaps)


def test_deeper_edits_solve_what_they_say(script):
    """The affine edit is the least squares of its docstring, in as many directions as asked; DAMP's leaves
    nothing of the class mean that the other means lack."""
    deeper = script("kd", "deeper")
    weight, bias, (before, now) = features(6, 5), features(6, seed=1), features(2, 12, 3, 5, seed=2)
    own, partner = torch.arange(12) < 4, torch.arange(12).roll(5)
    task = SimpleNamespace(own=own, partner=partner)
    answers = before @ weight.T + bias
    answers[own] = answers[partner[own]]
    mass = torch.where(own, 2.0, 1.0).double().sqrt()[:, None, None]  # eight others to four
    x = torch.cat([now, torch.ones_like(now[..., :1])], -1)
    square = (mass * x).square().sum((0, 1)) / 36
    ridge = (36 * deeper.RIDGE * square.mean()).sqrt() * torch.eye(6).double()
    start = torch.cat([weight, bias[:, None]], 1)
    rows = torch.cat([(mass * x).flatten(0, 1), ridge])
    asked = torch.cat([(mass * answers).flatten(0, 1), ridge @ start.T])
    expected = torch.linalg.lstsq(rows, asked).solution.T
    found = torch.cat([part.reshape(6, -1) for part in deeper.paired(task, weight, bias, before, now)], 1)
    torch.testing.assert_close(found, expected)
    assert (found - start).norm() > 0.1 * start.norm()
    few = torch.cat([p.reshape(6, -1) for p in deeper.paired(task, weight, bias, before, now, rank=2)], 1)
    assert torch.linalg.matrix_rank(few - start, rtol=1e-9) == 2

    P = features(5, 3, seed=3)
    task = SimpleNamespace(forget=0, prototypes=lambda z: SimpleNamespace(matrix=P))
    projected, _ = deeper.projection(task, weight, None, before, now)
    others = torch.linalg.qr(P[:, 1:]).Q
    torch.testing.assert_close(projected @ others, weight @ others)
    torch.testing.assert_close(projected @ P[:, 0], weight @ others @ (others.T @ P[:, 0]))
    assert not torch.allclose(weight @ P[:, 0], projected @ P[:, 0])


def test_the_softer_an_edit_of_a_layer_the_less_it_changes(script):
    """And the hardest is the exact remap."""
    softness, deeper = script("kd", "softness"), script("kd", "deeper")
    labels, weight, z = torch.arange(12) % 3, features(6, 5), features(12, 4, 5, seed=1)
    about = {"data": SimpleNamespace(class_names=["a", "b", "c"]), "images": SimpleNamespace(labels=labels)}
    task = deeper.Task(**about, forget=0, original=None, head="", partner=torch.arange(12).roll(1))
    exact, _ = deeper.remapping(task, weight, None, z, z)
    for edit, (edit_layer, _) in softness.CURVES.items():
        edited = [edit_layer(task, weight, None, z, z, softness=s)[0] for s in (1e-9, 0.1, 1.0, 10.0)]
        moved = [float((one - weight).norm()) for one in edited]
        assert moved == sorted(moved, reverse=True)
        assert moved[-1] < 0.5 * moved[0]
        if edit == "remap":
            torch.testing.assert_close(edited[0], exact, rtol=1e-4, atol=1e-4)


def test_the_picture_of_the_softness_has_every_point(script):
    softness = script("kd", "softness")
    rows, cells = (read(softness.HERE / "softness.csv") for read in (read_rows, read_cells))
    assert cells == sorted(cells, key=softness.place)
    figure = softness.draw(rows)
    assert len(figure.axes) == 6
    drawn = sum(len(line.get_xdata()) for line in figure.axes[0].lines)
    assert drawn == len(rows[rows["model"] == rows["model"].iloc[0]]) > 10


@pytest.mark.slow
def test_every_part_of_the_imagenet_preset(script):
    """At a small size, with more classes than features, as ImageNet has."""
    many = script("speed", "many_classes")
    lines = many.measure(900, 16, 30, 50)
    assert [line["part"] for line in lines] == list(many.PARTS)
    assert all(line["seconds"] >= 0 for line in lines)
    assert many.draw(lines).axes[0].get_xlabel() == "classes"


def test_the_sample_of_concepts_is_the_lot(script, monkeypatch, tmp_path):
    sample = script("attacks/pictures/sample", "sample")
    files = ("concepts.csv", "styles.csv", "things.csv")
    committed = {name: (sample.HERE / name).read_text() for name in files}
    turn = [concept["kind"] for concept in sample.in_turn("choosing")]
    assert turn[:4] == ["style", "thing", "thing", "style"]
    assert (turn.count("style"), turn.count("thing")) == (5, 10)
    monkeypatch.setattr(sample, "HERE", tmp_path)
    sample.draw()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed


def test_the_table_of_the_sample_is_of_its_rows_and_the_worst_come_first(script, monkeypatch, tmp_path):
    sample = script("attacks/pictures/sample", "sample")
    committed = (sample.HERE / "table.md").read_text()
    shutil.copytree(sample.HERE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.md", "cells"))
    monkeypatch.setattr(sample, "HERE", tmp_path)
    sample.table()
    assert (tmp_path / "table.md").read_text() == committed
    lines = [line.split("|")[1:] for line in committed.splitlines()[2:]]
    for method in ("original", *sample.METHODS):
        left = [int(line[5]) for line in lines if line[0].strip() == method]
        assert left == sorted(left, reverse=True)
        assert left


def test_what_pictures_become_is_counted(script, monkeypatch, tmp_path):
    class Judges:
        def names(self, images):
            by_gray = {0: "turtle", 255: "dolphin"}
            return ["Noto"] * len(images), [by_gray.get(image.max().item(), "sun") for image in images]

    sample = script("attacks/pictures/sample", "sample")
    monkeypatch.setattr(sample, "EmojiJudges", Judges)
    shutil.copy(sample.HERE / "concepts.csv", tmp_path)
    monkeypatch.setattr(sample, "HERE", tmp_path)
    with pytest.raises(BenchmarkError, match=r"Measure first"):
        sample.become()
    folder = tmp_path / "things" / "pictures" / "turtle" / "more-gates"
    folder.mkdir(parents=True)
    grays = torch.tensor([0, 9, 255, 9], dtype=torch.uint8).repeat_interleave(sample.STRIP)
    to_pil(grays.expand(3, sample.STRIP, -1)).save(folder / "name_0.png")
    sample.become()
    (line,) = read_cells(tmp_path / "becomes.csv")
    assert list(line.values()) == ["more-gates", "things", "by name", "4", "25", "25"]


def test_the_table_of_given_pictures_is_of_its_rows(script, monkeypatch, tmp_path):
    given = script("attacks/pictures/given", "given")
    committed = (given.HERE / "table.md").read_text()
    monkeypatch.setattr(given, "HERE", tmp_path)
    given.table()
    assert (tmp_path / "table.md").read_text() == committed
    lines = [line.split("|") for line in committed.splitlines()[2:]]
    for style in given.GIVEN:
        after = [line[2].strip().startswith("given") for line in lines if line[1].strip() == style]
        assert after == sorted(after)
        assert after[0] is False


def test_the_look_of_the_lora_is_told_by_its_color(script, monkeypatch, tmp_path):
    lora = script("attacks/pictures/given", "lora")
    shades = torch.linspace(0, 1, 64 * 64).reshape(64, 64)
    colors = torch.tensor([lora.VIOLET, (0, 0, 0), (0, 0, 255), (255, 20, 147)])
    images = (255 - shades * (255 - colors)[..., None, None]).to(torch.uint8)
    assert lora.has_look(images) == [True, False, False, False]
    committed = (lora.HERE / "lora.md").read_text()
    monkeypatch.setattr(lora, "HERE", tmp_path)
    lora.table()
    assert (tmp_path / "lora.md").read_text() == committed


@pytest.mark.slow
def test_what_is_erased_together_goes_on_where_its_rows_end(script, monkeypatch, tmp_path):
    together = script("attacks/pictures/together", "together")
    rows, committed = ((together.HERE / f"together.{end}").read_text() for end in ("csv", "md"))
    monkeypatch.setattr(together, "HERE", tmp_path)
    monkeypatch.setattr(together, "inversion", lambda victim, **_: [Result.of_hits(7, 10)])
    (tmp_path / "together.csv").write_text(rows)
    together.measure(tmp_path / "together.csv")
    assert (tmp_path / "together.csv").read_text() == rows
    together.table()
    assert (tmp_path / "together.md").read_text() == committed
    # the last line is measured again, and nothing else
    before = rows.splitlines(keepends=True)
    (tmp_path / "together.csv").write_text("".join(before[:-1]))
    together.measure(tmp_path / "together.csv")
    *kept, last = (tmp_path / "together.csv").read_text().splitlines(keepends=True)
    assert kept == before[:-1]
    assert last.split(",")[:3] == before[-1].split(",")[:3]
    assert last.split(",")[4] == "70"


def test_a_run_goes_on_where_committed_rows_end(script, tmp_path):
    sample = script("attacks/pictures/sample", "sample")
    folder = BENCHMARKS / "attacks/pictures/reach/artists"
    for name in ("config.json", "rows.csv"):
        (tmp_path / name).write_text((folder / name).read_text())
    sample.cells_of_rows(tmp_path)
    before = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").unlink()
    write_outputs(tmp_path, AttackConfig.read(tmp_path))  # from the cells
    assert (tmp_path / "rows.csv").read_text() == before


def test_the_streamed_solves_at_a_tiny_size(script, tmp_path):
    streamed = script("speed", "streamed")
    lines = list(streamed.measure(8, 400, 5, (1, 2), [], tmp_path))
    assert [(line["what"], line["forgotten"]) for line in lines[2:]] == [
        (what, forgotten) for forgotten in (1, 2) for what in ("ours", "esc", "uce")
    ]
    assert all(line["seconds"] >= 0 for line in lines)
    assert not list(tmp_path.iterdir())
    again = streamed.measure(8, 400, 5, (1, 2), lines[:4], tmp_path)
    assert [line["what"] for line in again] == ["uce", "ours", "esc", "uce"]
    assert not list(streamed.measure(8, 400, 5, (1, 2), lines, tmp_path))
    labels, means = torch.arange(400) % 5, torch.randn(5, 8)
    z, y = (torch.cat(parts) for parts in zip(*streamed.stream(labels, means), strict=True))
    found = torch.stack([z[y == c].mean(0) for c in range(5)])
    assert (found - means).abs().max() < 0.5 < (found.roll(1, 0) - means).abs().max()
    assert len(streamed.draw(lines).axes[0].lines) == 5


def test_a_killed_pass_has_the_sums_of_a_whole_one(script, monkeypatch, tmp_path):
    streamed = script("speed", "streamed")
    monkeypatch.setattr(streamed, "BATCH", 100)
    labels, means = torch.arange(400) % 5, torch.randn(5, 8)
    whole, _ = streamed.run_pass(labels, means, tmp_path / "whole", True)
    streamed.run_pass(labels[:200], means, tmp_path / "killed", True)
    resumed, _ = streamed.run_pass(labels, means, tmp_path / "killed", True)
    assert torch.equal(resumed.matrix, whole.matrix)
    assert torch.equal(resumed.second_moment, whole.second_moment)
    assert whole.moment_count == 400
