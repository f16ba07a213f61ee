"""The READMEs' code runs, their commands parse, their tables are the committed ones, and their links work."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.families import TINY, build, denoiser_of
from transformers import AutoModelForImageClassification, ViTImageProcessor

import more_hf
from more_hf.classification.names import class_names
from more_hf.cli.main import parse
from more_hf.diffusion.families import FAMILIES, family_of
from more_hf_bench.methods.registry import find_diffusion_method


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = (ROOT / "examples" / "README.md").read_text("utf-8")


BENCHMARK_PAGES = [*sorted((ROOT / "benchmarks").rglob("README.md")), ROOT / "benchmarks" / "kd" / "paper.md"]
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += [page.relative_to(ROOT).as_posix() for page in BENCHMARK_PAGES]


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def here(tiny_sd, digit_classifier, digits, tmp_path, monkeypatch):
    """A working directory in which the names that the blocks would look up on the Hub are folders."""
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained("CompVis/stable-diffusion-v1-4")
    digit_classifier.save_pretrained("my-classifier")
    ViTImageProcessor(do_resize=False, do_normalize=False).save_pretrained("my-classifier")
    for i, (image, label) in enumerate(zip(digits[0][:200, 0], digits[1][:200].tolist(), strict=True)):
        folder = tmp_path / "my-images" / "train" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image).round().byte().numpy()).save(folder / f"{i}.png")
    return tmp_path


def is_family(block):
    return "register_family(" in block


def is_timm(block):
    return block.startswith("import timm")


def is_clip(block):
    return "CLIPModel" in block  # `classification/test_zero_shot.py` runs it


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [
        block
        for block in [*blocks(README), *blocks(EXAMPLES)[:-1]]
        if not (is_family(block) or is_timm(block) or is_clip(block))
    ],
)
def test_every_python_block_runs(block, here):
    names = {}
    exec(compile(block, "README.md", "exec"), names)

    saved = [path.parent for path in here.rglob("more_hf.json")]
    assert len(saved) == 1
    assert more_hf.verify(saved[0]).ok
    erased = names["pipe"] if "pipe" in names else names["model"]
    known = (["Blobmoji"], ["Blobmoji", "crab"], ["Van Gogh"], ["3"], ["three"])
    assert more_hf.get_erasure(erased).concepts in known


def test_a_model_of_timm_is_wrapped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = filter(is_timm, blocks(EXAMPLES))
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    saved = AutoModelForImageClassification.from_pretrained("my-timm-model").eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(saved(pixels).logits, names["own"].eval()(pixels))
    assert class_names(saved, 3) == ("tench", "goldfish", "hen")


def test_a_family_of_ones_own(cogview_3):
    (block,) = filter(is_family, blocks(EXAMPLES))
    exec(compile(block, "README.md", "exec"), {})
    pipe = more_hf.erase_concept(cogview_3, "van gogh", remap_to="claude monet")
    assert list(more_hf.get_erasure(pipe).sites) == ["patch_embed.text_proj"]


def test_a_method_of_ones_own(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_method.py").write_text(blocks(EXAMPLES)[-1])
    method = find_diffusion_method("my_method:my_erase")
    pipe = method(tiny_sd(), "Van Gogh", remap_to=["Claude Monet"], retain=[])
    assert more_hf.get_erasure(pipe).concepts == ["Van Gogh"]


def test_every_command_is_one_that_the_command_line_knows():
    files = [ROOT / name for name in PAGES]
    text = "\n".join(file.read_text("utf-8") for file in files).replace("\\\n", " ")
    commands = re.findall(r"^(?: {4})?(?:.* && )?more-hf (.*)$", text, re.MULTILINE)
    assert len(commands) > 20
    for command in commands:
        arguments = shlex.split(re.sub(r"\$\([^)]*\)", "1", command), comments=True)
        assert callable(parse(arguments).run)
    with pytest.raises(SystemExit):
        parse(["bench", "artist"])


def test_the_tables_are_the_committed_ones():
    script = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    assert {ROOT / "README.md", ROOT / "benchmarks" / "README.md"} < set(script["READMES"])
    for readme in script["READMES"]:
        text = readme.read_text("utf-8")
        assert script["filled"](text) == text
        assert text.count("<!-- table: ") == len(re.findall(r"-->\n\n\|", text)) > 0
        # without an empty line after a table, what follows is one more row
        assert re.findall(r"^\|.*\n(?!\||$)", text, re.MULTILINE) == []
    for column in ("| lpips_f", "FLUX.2, "):  # a table that was edited by hand is noticed
        edited = README.replace(column, "", 1)
        assert script["filled"](edited) == README != edited


@pytest.mark.parametrize("name", PAGES)
def test_links_and_pictures_exist(name):
    file = ROOT / name
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", file.read_text("utf-8"))
    for link, anchor in links:
        if link.startswith("http"):
            continue
        target = file.parent / link if link else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), (link, anchor)


def anchors(text):
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_table_of_families_is_the_registry():
    found, supported = {}, r"^\| (.+) \| ✓ \| ✓ \| (\S+) \| (\S+) \| (\S+) \| ✓ \|$"
    for row, *reads in re.findall(supported, README, re.MULTILINE):
        found |= dict.fromkeys(row.split(", "), [read == "✓" for read in reads])
    assert sorted(found) == sorted(family.name for family in FAMILIES.values())
    for key in TINY:
        pipe = build(key)
        name = family_of(denoiser_of(pipe)).name
        peft, kohya = hasattr(pipe, "load_lora_weights"), key in ("sd-1", "sd-2", "sdxl")
        assert found[name] == [peft, kohya, key not in ("kolors", "cogview-4")]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


def test_the_pages_of_the_benchmarks_are_short():
    assert sum(len(page.read_text("utf-8").split()) for page in BENCHMARK_PAGES) <= 20_000


def test_the_tests_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > 10
    for file, function in named:
        wanted = f"def {function}(" if function else "def test_"
        assert wanted in (ROOT / "tests" / file).read_text("utf-8"), (file, function)
