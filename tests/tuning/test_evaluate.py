"""`evaluate` on any pair: nothing moves between a model and itself, and what differs is named."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from support.compare import same, state
from support.pipelines import build_tiny_sd

import more_hf
from more_hf.cli.main import main
from more_hf.data import load_lpips
from more_hf.diffusion.draw import draw
from more_hf.tuning.evaluate import NAMELESS, _differences, misspellings
from more_hf.tuning.judge import lpips_distance


STEPS = {"sampling": {"num_inference_steps": 2}}


@pytest.fixture(scope="module")
def base():
    return build_tiny_sd()


@pytest.fixture(scope="module")
def erased():
    return more_hf.erase_concept(build_tiny_sd(), "van gogh", remap_to="claude monet")


def evaluate(base, erased, **options):
    options = {"retain": ["claude monet"], "pictures": 4, **STEPS, **options}
    return more_hf.evaluate(base, erased, "van gogh", **options)


def moved(found):
    return {finding.prompts: finding.moved.value for finding in found.findings}


@pytest.mark.usefixtures("quick_features")
def test_a_model_against_itself(base, tmp_path):
    before = state(base)
    found = evaluate(base, base, descriptions=["swirls", "thick paint"])
    assert list(moved(found)) == [
        "van gogh",
        "misspelled: van ggoh, van goh, van goggh",
        "described: swirls, thick paint",
        "claude monet",
        NAMELESS,
    ]
    for finding in found.findings:
        assert finding.base == finding.erased
        assert (finding.moved.value, finding.moved.low, finding.moved.high) == (0, 0, 0)
    assert found.differences == ()
    assert same(base, before)
    folder = found.save(tmp_path / "new" / "folder")
    assert (folder / "table.md").read_text("utf-8").startswith(found.to_markdown())
    assert (folder / "sheet.png").stat().st_size > 1000


@pytest.mark.slow
def test_an_erased_model_moves_where_the_name_is(base, erased):
    found = evaluate(base, erased)
    assert moved(found)["van gogh"] > moved(found)[NAMELESS] > 0
    assert found.differences == (f"`unet` (8 of {len(base.unet.state_dict())} tensors)",)
    assert "(-" not in found.to_markdown()
    # random weights draw nothing that a judge could know
    assert "It cannot tell them apart" in found.to_markdown()


@pytest.mark.slow
def test_how_far_pictures_move_is_lpips_from_the_same_noise(base, erased):
    found = evaluate(base, erased, sentences=["a {}", "{} tree"])
    network, distances = load_lpips(), []
    for seed, prompt in enumerate(["a van gogh", "van gogh tree"] * 2):
        pair = []
        for pipe in (base, erased):
            generator = torch.Generator().manual_seed(seed)
            drawn = pipe(prompt, generator=generator, output_type="np", **STEPS["sampling"]).images
            pair.append(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1)
        distances.append(float(network(*pair)))
    assert found.findings[0].moved.value == pytest.approx(sum(distances) / 4, rel=0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_features")
def test_another_scheduler_and_precision(base):
    own = DDIMScheduler(num_train_timesteps=50, beta_schedule="linear")
    other = copy.deepcopy(base).to(torch.bfloat16, silence_dtype_warnings=True)
    other.register_modules(scheduler=own)
    found = evaluate(base, other)
    by_its_own = [draw(pipe, ["a cat"], [0], STEPS["sampling"]) for pipe in (base, other)]
    assert max(moved(found).values()) < 0.2 * lpips_distance(*by_its_own)
    assert found.differences[-1] == "`scheduler` (PNDMScheduler and DDIMScheduler; both drew with the base's)"
    assert "the precision of `unet` (float32 and bfloat16)" in found.differences
    assert not any("tensors" in difference for difference in found.differences)
    assert other.scheduler is own


@pytest.mark.slow
@pytest.mark.usefixtures("quick_features")
def test_more_that_differs(base):
    other = copy.copy(base)
    other.register_modules(text_encoder=build_tiny_sd(seed=1).text_encoder)
    found = evaluate(base, other)
    (difference,) = found.differences
    assert difference.startswith("`text_encoder` (")
    assert min(moved(found).values()) > 0
    offloaded = copy.copy(base)
    offloaded.register_modules(vae=copy.deepcopy(base.vae).to("meta"))
    assert list(_differences(base, offloaded)) == ["`vae`, perhaps: it is offloaded, and was not compared"]
    with pytest.raises(more_hf.MoreError, match="draws 32x32 pixels and the other 16x16"):
        evaluate(base, build_tiny_sd(sample_size=8))


def test_names_that_contradict(base):
    with pytest.raises(more_hf.PrototypeError, match="both erased and in `retain`"):
        evaluate(base, base, retain=["Van Gogh"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Blobmoji", ["Blomboji", "Bloboji", "Blobmmoji"]),
        ("Van Gogh", ["Van Ggoh", "Van Goh", "Van Goggh"]),
        ("oo", ["o", "ooo"]),
        ("x", []),
    ],
)
def test_misspellings(name, expected):
    assert misspellings(name) == expected


@pytest.mark.slow
def test_on_the_command_line(copy_of_emoji_sd, tmp_path, capsys):
    erased = more_hf.erase_concept(copy_of_emoji_sd(), "Blobmoji", remap_to="Fluent")
    layers = {f"{name}.weight": site.read() for name, site in more_hf.get_erasure(erased).sites.items()}
    save_file(layers, tmp_path / "layers.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    files = [tmp_path / "layers.safetensors", more_hf.save_lora(erased, tmp_path / "lora.safetensors")]
    argv = ["evaluate", "emoji-sd", "FILE", "--concept", "Blobmoji", "--pictures", "4", "--steps", "2"]
    tables = []
    for file in files:
        argv[2] = str(file)
        assert main([*argv, "--output", str(tmp_path / "out")]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        tables.append([float(line.split("|")[-2].split()[0]) for line in lines[2:]])
    assert tables[0] == pytest.approx(tables[1], abs=0.002)  # how far pictures moved
    assert max(tables[0]) > 0.02
    assert (tmp_path / "out" / "sheet.png").is_file()
    argv[2] = str(tmp_path / "other.safetensors")
    assert main(argv) == 2
    assert "no weight of `unet`" in capsys.readouterr().err


@pytest.mark.slow
def test_the_embedded_pipeline(emoji_sd, copy_of_emoji_sd):
    options = {"retain": ["Noto", "Fluent"], "pictures": 12}
    options["sampling"] = {"num_inference_steps": 5, "guidance_scale": 4.0}
    erased = more_hf.erase_concept(copy_of_emoji_sd(), "High Contrast", remap_to="Fluent")
    found = more_hf.evaluate(emoji_sd, erased, "High Contrast", **options)
    findings = {finding.prompts: finding for finding in found.findings}
    named, kept = findings["High Contrast"], findings["Noto"]
    assert found.judge.can_tell("High Contrast"), found
    assert named.base.value > 0.7
    assert named.erased.value < 0.3
    assert kept.erased.value > 0.7
    assert kept.moved.high < named.moved.low
