"""`verify(rerun=True)` erases again from the original, and says how far the files are from that."""

import hashlib

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from support.pipelines import build_tiny_sd
from support.records import list_files_again, read_record, write_record

import more_hf
from more_hf.cli.main import main
from more_hf.core.site import fingerprint


BASE, AGAIN = "the original is the one that was erased from", "erased again, it is the same"
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def base(tmp_path):
    build_tiny_sd().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def erased(base, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True)
    more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")
    return more_hf.save(pipe, tmp_path / "erased")


def rerun(folder, **options):
    """What `rerun` adds, by name."""
    return {check.name: check for check in more_hf.verify(folder, rerun=True, **options).checks[-2:]}


def forge(folder, change):
    """Change a layer's weights and everything in the record that says what they are."""
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"{SITE}.weight"] = change(tensors[f"{SITE}.weight"])
    save_file(tensors, file, {"format": "pt"})
    list_files_again(folder)
    record = read_record(folder)
    record["edited"] = fingerprint({name: tensors[f"{name}.weight"] for name in record["sites"]})
    write_record(folder, record)


def test_the_same_bit_for_bit(base, erased):
    assert more_hf.verify(erased, rerun=True)
    found = rerun(erased)
    assert found[AGAIN].finding.endswith("tensors, bit for bit")
    files = {path.relative_to(base).as_posix(): path for path in base.rglob("*") if path.is_file()}
    read = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert read_record(erased)["sources"] == read


def test_what_is_not_the_same(erased, tmp_path):
    build_tiny_sd(seed=1).save_pretrained(tmp_path / "other")
    found = rerun(erased, base=tmp_path / "other")
    assert not found[BASE].passed
    assert "text_encoder/model.safetensors" in found[BASE].finding
    assert not found[AGAIN].passed


@pytest.mark.parametrize(("factor", "passes"), [(1 + 1e-6, True), (1.2, False)])
def test_how_far_apart(erased, factor, passes):
    """Also where the record was forged to agree, so that nothing else in the folder tells."""
    forge(erased, lambda weight: weight * factor)
    again = rerun(erased)[AGAIN]
    assert again.passed == passes
    assert again.finding.startswith("1 of ")
    assert f"`unet/{SITE}.weight` by " in again.finding


def test_what_differs_in_the_environment(erased):
    record = read_record(erased)
    record["versions"]["torch"], record["facts"]["device"] = "1.0", "cuda (Voodoo 2)"
    write_record(erased, record)
    finding = rerun(erased)[AGAIN].finding
    assert f"torch was 1.0, is {torch.__version__.split('+')[0]}" in finding
    assert "device was cuda (Voodoo 2), is cpu (" in finding
    assert "python" not in finding


def test_on_the_command_line(base, erased, capsys):
    base.rename(base.with_name("elsewhere"))
    assert main(["verify", str(erased), "--rerun"]) == 2
    assert "Pass `base=` (`--base`)" in capsys.readouterr().err
    assert main(["verify", str(erased), "--rerun", "--base", str(base.with_name("elsewhere"))]) == 0
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_commit_is_of_its_repository(erased, monkeypatch):
    record = read_record(erased)
    record["facts"] |= {"base": "me/base", "base_revision": "1" * 40}
    write_record(erased, record)
    load, asked = StableDiffusionPipeline.from_pretrained, []

    def from_pretrained(source, **options):
        if source == erased:  # the check of the folder
            return load(source, **options)
        asked.append((source, options["revision"]))
        return build_tiny_sd()

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", from_pretrained)
    assert "bit for bit" in rerun(erased)[AGAIN].finding
    rerun(erased, base="you/base")
    assert asked == [("me/base", "1" * 40), ("you/base", None)]


def test_a_classifier_needs_its_data(model, loader, tmp_path):
    folder = more_hf.save(more_hf.erase_classes(model, loader, forget=["four"]), tmp_path / "erased")
    with pytest.raises(more_hf.MoreError, match="samples of somebody's data"):
        more_hf.verify(folder, rerun=True)
