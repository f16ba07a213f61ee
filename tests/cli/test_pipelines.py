from types import SimpleNamespace

import pytest
from PIL import Image
from support.pipelines import ONE_ATTENTION

import more_hf
from more_hf.cli.concept_list import read_concepts
from more_hf.cli.main import main, parse
from more_hf.cli.request import read_request
from more_hf.data import EMOJI_ARTISTS
from more_hf_bench.artists.demo import demo_rows
from more_hf_bench.columns import read_cells


@pytest.fixture
def failure(capsys):
    """Run a command that must fail, and return its line."""

    def run(*argv):
        assert main([str(arg) for arg in argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith("Error: ")
        return line

    return run


def test_demo_rows():
    rows = demo_rows(["Noto"], limit=20, seed=7)
    assert [row.evaluation_seed for row in rows] == list(range(7, 67))
    assert {row.artist for row in rows[:20]} == {"Noto"}
    assert {row.artist for row in rows[20:40]} == set(EMOJI_ARTISTS) - {"Noto"}
    assert {row.artist for row in rows[40:]} == {""}
    assert rows[0].prompt == f"a {rows[0].thing} in the style of Noto"
    assert rows[40].prompt == f"a {rows[40].thing}"
    assert demo_rows(["Noto"], limit=3, seed=7)[:3] == rows[:3]


@pytest.mark.slow
@pytest.mark.parametrize("remap_to", ["Fluent", "none"])
def test_demo(tmp_path, capsys, remap_to):
    output = tmp_path / "demo"
    argv = ["demo", "--concept", "high contrast", "--remap_to", remap_to, "--limit", "2", "--steps", "3"]
    assert main([*argv, "--seed", "3", "--batch_size", "4", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "is recognised in" in out
    assert "Open " in out.splitlines()[-2]
    written = sorted(path.name for path in output.iterdir())
    assert written == ["before_after.webp", "report.html", "rows.csv", "table.md"]
    rows = read_cells(output / "rows.csv")
    assert list(rows[0]) == [
        "method", "forget", "group", "case_number", "prompt", "evaluation_seed", "artist", "thing", "lpips",
        "style_before", "style_after", "content_before", "content_after",
    ]  # fmt: skip
    assert [row["group"] for row in rows] == ["forget"] * 2 + ["remain"] * 2 + ["no artist"] * 2
    assert {row["forget"] for row in rows} == {"High Contrast"}
    assert [row["evaluation_seed"] for row in rows] == [str(seed) for seed in range(3, 9)]
    # the edit changed the forgotten artist's pictures
    assert all(float(row["lpips"]) > 0 for row in rows[:2])
    assert ("distance to Fluent" in (output / "table.md").read_text()) == (remap_to != "none")
    Image.open(output / "before_after.webp").verify()
    page = (output / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp") == 1
    assert "guarantee" in page


@pytest.mark.slow
def test_demo_of_two_artists_fills_its_picture(tmp_path):
    argv = ["demo", "--concept", "Noto", "fluent", "--limit", "2", "--steps", "2", "--output", str(tmp_path)]
    assert main(argv) == 0
    text = (tmp_path / "table.md").read_text()
    assert "Noto+Fluent" in text
    assert "Twemoji" in text  # Fluent is no target where it is erased
    artists = [row["artist"] for row in read_cells(tmp_path / "rows.csv")]
    assert artists[:2] == ["Noto", "Fluent"]
    picture = Image.open(tmp_path / "before_after.webp")
    assert picture.width < 500  # two columns of 128 pixels, or the title


def test_demo_names_the_artist_meant(failure):
    assert "Leave at least one out" in failure("demo", "--concept", *EMOJI_ARTISTS)
    assert "Did you mean 'Blobmoji'?" in failure("demo", "--concept", "Blobmojy")
    assert "Did you mean 'Fluent'?" in failure("demo", "--remap_to", "flunt")
    assert "Available: Twemoji" in failure("demo", "--concept", "Van Gogh")
    assert "beside other names" in failure("demo", "--remap_to", "none", "Fluent")


def test_erase_then_verify(tiny_sd, tmp_path, capsys):
    base, output = tmp_path / "base", tmp_path / "erased"
    tiny_sd().save_pretrained(base)
    argv = ["erase", base, "--concept", "Van Gogh", "--concept", "Picasso", "--output", output]
    argv += ["--alias", "Van Gogh=Vincent van Gogh", "--retain", "a dog"]
    argv += ["--remap_to", "Claude Monet", "Johannes Vermeer"]
    assert main([str(arg) for arg in argv]) == 0
    out = capsys.readouterr().out
    assert "Van Gogh" in out
    assert "more-hf verify" in out

    assert main(["verify", str(output)]) == 0
    assert "| yes " in capsys.readouterr().out

    # The original's denoiser in the erased folder: the record says otherwise.
    name = "unet/diffusion_pytorch_model.safetensors"
    (output / name).write_bytes((base / name).read_bytes())
    assert main(["verify", str(output)]) == 1
    assert "| NO " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("reach", ["denoiser", "gates"])
def test_erase_inside_the_denoiser(tiny_sd, tmp_path, failure, reach):
    tiny_sd(**ONE_ATTENTION).save_pretrained(tmp_path / "base")
    argv = ["erase", str(tmp_path / "base"), "--concept", "Van Gogh", "--remap_to", "Claude Monet"]
    argv += ["--output", str(tmp_path / "erased"), "--steps", "2", "--guidance", "2.5"]
    assert "Leave `--steps` and `--guidance` out" in failure(*argv)
    assert main([*argv, "--reach", reach, "--softness", "0.5"]) == 0
    request = more_hf.get_erasure(more_hf.load(tmp_path / "erased")).request
    assert request.reach == reach
    assert request.softness == 0.5
    assert request.sampling == {"num_inference_steps": 2, "guidance_scale": 2.5}


def test_erase_passes_every_flag_on(tmp_path, monkeypatch, capsys):
    seen = {}

    def erase_concept(pipe, concepts, **options):
        seen.update(concepts=concepts, **options)

    # raising=False: the package resolves these names when they are first asked for.
    def load_emoji_sd(**options):
        seen.update(options)
        return SimpleNamespace(to=lambda device, **options: seen.update(device=str(device)))

    monkeypatch.setattr(more_hf, "load_emoji_sd", load_emoji_sd, raising=False)
    monkeypatch.setattr(more_hf, "erase_concept", erase_concept, raising=False)

    def save(pipe, folder, **options):
        seen.update(folder=folder, **options)

    monkeypatch.setattr(more_hf, "save", save, raising=False)
    monkeypatch.setattr(more_hf, "get_erasure", lambda pipe: "facts", raising=False)
    argv = "erase --concept Noto crab --alias Noto=noto-emoji --remap-to none --retain pizza --num-experts 2 "
    argv += "--router hash --include_delta --solver covariance --tokens positions --seed=4 --dtype bfloat16"
    argv += " --device cpu --reach denoiser --softness 2 --strength 1 --steps 10"
    assert main([*argv.split(), "--model", "emoji-sd", "--output", str(tmp_path / "out")]) == 0
    assert str(seen.pop("dtype")) == "torch.bfloat16"
    assert seen == {
        "concepts": {"Noto": ["noto-emoji"], "crab": []}, "remap_to": None, "retain": ["pizza"],
        "num_experts": 2, "router": "hash", "solver": "covariance", "tokens": "positions",
        "reach": "denoiser", "softness": 2.0, "strength": 1.0, "seed": 4, "device": "cpu",
        "sampling": {"num_inference_steps": 10}, "folder": tmp_path / "out", "include_delta": True,
    }  # fmt: skip
    assert capsys.readouterr().out.startswith("facts\n")


def test_erase_fails_in_one_line(failure, tmp_path):
    rest = ["--remap_to", "Fluent", "--output", tmp_path / "out"]
    assert "NAME=ALIAS" in failure("erase", "emoji-sd", "--concept", "Noto", "--alias", "Noto", *rest)
    assert "not erased" in failure("erase", "emoji-sd", "--concept", "Noto", "--alias", "Fluent=x", *rest)
    assert "Name one model" in failure("erase", "--concept", "Noto", *rest)
    assert "Name one model" in failure("erase", "emoji-sd", "--model", "emoji-sd", "--concept", "Noto", *rest)
    assert "Fluent" in failure("erase", "emoji-sd", "--concept", "Fluent", *rest)
    assert not (tmp_path / "out").exists()


LIST = """\ufeff# what must go\r
Noto -> Fluent\r
\r
 crab->  fish , red heart\r
pizza\r
"""


def test_a_list_of_concepts(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(LIST.encode())
    listed = {"Noto": ["Fluent"], "crab": ["fish", "red heart"], "pizza": []}
    assert {name: list(own.targets) for name, own in read_concepts(file).concepts.items()} == listed

    def request(words):
        argv = [*words.split(), "--model", "emoji-sd", "--concepts_file", str(file), "--output", "out"]
        request = read_request(parse(["erase", *argv]))
        return request.concepts, request.options["remap_to"]

    own = {name: targets for name, targets in listed.items() if targets}
    names = dict.fromkeys(listed, [])
    assert request("--remap_to dog") == (names, {"pizza": ["dog"], **own})
    assert request("--remap_to none") == (names, {"pizza": None, **own})
    assert request("--concept a b --remap_to a=c a=d b=none dog --alias a=e") == (
        {"a": ["e"], "b": [], **names},
        {"pizza": ["dog"], **own, "a": ["c", "d"], "b": None},
    )


# Formats of others, each of which was once erased literally
FOREIGN = ["Noto => Fluent", "Noto, crab -> Fluent", "Noto = noto emoji -> Fluent", "Noto: Fluent", "- Noto"]
FOREIGN += ["1. Noto", "Noto - Fluent", "Noto -> Fluent -> crab", '"Noto"', "Noto\tFluent"]
FOREIGN += ["Noto # the one by Google"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Noto\n-> Fluent", "line 2: '-> Fluent' is neither"),
        ("# one\n\nNoto ->", "line 3: 'Noto ->' is neither"),
        ("Noto -> Fluent,, crab", "line 1"),
        ("Noto\ncrab\nNoto -> crab", "line 3: 'Noto' is listed twice"),
        ("# nobody", "Nothing to erase is named"),
        ("Noto -> Fluent\ncrab", "no target for 'crab'"),
        ("Notto -> Fluent", "Did you mean 'Noto'?"),
        ("Noto -> Fluennt", "Did you mean 'Fluent'?"),
        ("Noto -> none, Fluent", "beside other names"),
        ("Noto\xff", "not text in UTF-8"),
        *((text, "line 1") for text in FOREIGN),
    ],
)
def test_a_list_that_cannot_be_meant(failure, tmp_path, text, message):
    (tmp_path / "names.txt").write_bytes(text.encode("latin-1"))
    argv = ["erase", "emoji-sd", "--concepts_file", tmp_path / "names.txt", "--output", tmp_path / "out"]
    assert message in failure(*argv)
    assert not (tmp_path / "out").exists()


def test_targets_on_the_command_line_that_cannot_be_meant(failure, tmp_path):
    rest = ["erase", "emoji-sd", "--concept", "Noto", "--output", tmp_path / "out", "--remap_to"]
    assert "neither TARGET nor NAME=TARGET" in failure(*rest, "Noto=")
    assert "'crab', which is not forgotten" in failure(*rest, "Noto=Fluent", "crab=fish")
    assert "Nothing to erase" in failure("lora", "emoji-sd", "--remap_to", "dog", "--output", tmp_path)


def test_verify_needs_a_record(failure, tmp_path):
    assert "no more_hf.json" in failure("verify", tmp_path)
    assert "no folder" in failure("verify", tmp_path / "missing")


TOML = """
remap_to = "fish"
retain = ["dog"]

[concepts]
Noto = ["Fluent", "Twemoji"]
crab = {}
"pizza, hot" = "none"
Blobmoji = { remap_to = "Fluent", aliases = ["blob emoji"], reach = "denoiser" }
"""


def test_a_list_in_toml(tmp_path, caplog):
    file = tmp_path / "names.toml"
    file.write_text(TOML)
    argv = ["erase", "emoji-sd", "--concepts_file", str(file), "--retain", "ninja", "--output", "out"]
    with caplog.at_level("INFO", logger="more_hf"):
        request = read_request(parse(argv))
    assert request.concepts == {"Noto": [], "crab": [], "pizza, hot": [], "Blobmoji": ["blob emoji"]}
    assert request.options == {
        "remap_to": {
            "Noto": ["Fluent", "Twemoji"], "crab": ["fish"], "pizza, hot": None, "Blobmoji": ["Fluent"]
        },
        "retain": ["dog", "ninja"],
        "reach": {"Blobmoji": "denoiser"},
        "sampling": {},
    }  # fmt: skip
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in caplog.text.splitlines()]
    assert ["Noto", "", "Fluent and Twemoji", "name"] in table
    assert ["pizza, hot", "", "nothing", "name"] in table
    assert ["Blobmoji", "blob emoji", "Fluent", "denoiser"] in table
    assert "Spared: dog, ninja" in caplog.text
    assert "'ninja' is in no caption" in caplog.text
    assert "'dog' is in no caption" not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[concepts]\nNoto = ", "Invalid value"),
        ("concepts = ['Noto']", "must be a table"),
        ("[concepts]\nNoto = 3", "`remap_to` of `Noto` must be a name"),
        ("[concepts]\nNoto = {to = 'Fluent'}", "'Noto' has 'to'; it takes remap_to, aliases, reach"),
        ("keep = 'dog'", "the list has 'keep'"),
        ("[concepts]\nNoto = {remap_to = 'Fluent', reach = 'far'}", "must be one of name, denoiser"),
        ("[concepts]\nNoto = {}", "no target for 'Noto'"),
        ("[concepts]\nNoto = 'Fluent'\nNoto = 'crab'", "verwrite"),
    ],
)
def test_a_list_in_toml_that_cannot_be_meant(failure, tmp_path, text, message):
    (tmp_path / "names.toml").write_text(text)
    argv = ["erase", "emoji-sd", "--concepts_file", tmp_path / "names.toml", "--output", tmp_path / "out"]
    assert message in failure(*argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Noto=Fluent", "Noto -> Fluent", "Noto=>Fluent"])
def test_a_target_within_a_name_is_refused(failure, name):
    assert "Pass its target by" in failure("erase", "emoji-sd", "--concept", name, "--output", "out")
