"""`load` from the Hub: one commit for all; no code, no pickle; the weights that the record is of."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from support.compare import same

import more_hf
from more_hf.saving import folder as hub


FIRST, SECOND = "a" * 40, "b" * 40
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SITE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


class Cache:
    """A folder laid out like the Hub's cache, which is all that is read when offline."""

    def __init__(self, folder):
        self.folder, self.repo = folder, folder / "models--me--erased"

    def add(self, commit, source):
        shutil.copytree(source, self.repo / "snapshots" / commit)
        return self.repo / "snapshots" / commit

    def point(self, name, commit):
        (self.repo / "refs").mkdir(exist_ok=True)
        (self.repo / "refs" / name).write_text(commit)

    def load(self, **kwargs):
        return more_hf.load("me/erased", cache_dir=self.folder, **kwargs)


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory):
    """Two erasures of one model, with factors, and the original's state."""
    from support.pipelines import build_tiny_sd

    folder, original = tmp_path_factory.mktemp("saved"), build_tiny_sd()
    for name in ("van gogh", "pablo picasso"):
        options = {"remap_to": ["claude monet", "andy warhol"], "router": "hash"}
        pipe = more_hf.erase_concept(build_tiny_sd(), name, **options)
        more_hf.save(pipe, folder / name, include_delta=True)
    return folder / "van gogh", folder / "pablo picasso", original.unet.state_dict()


@pytest.fixture
def cache(saved_twice, tmp_path):
    cache = Cache(tmp_path)
    cache.add(FIRST, saved_twice[0])
    cache.add(SECOND, saved_twice[1])
    cache.point("main", FIRST)
    cache.point("other", SECOND)
    return cache


def same_weights(pipe, folder):
    expected = load_file(folder / WEIGHTS)
    return same(pipe.unet, expected)


@pytest.mark.parametrize(("revision", "which"), [(None, 0), ("other", 1), (SECOND, 1)])
def test_load_from_the_hub(cache, saved_twice, revision, which):
    pipe = cache.load(revision=revision)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.concepts == [("van gogh", "pablo picasso")[which]]
    assert same_weights(pipe, saved_twice[which])
    assert not same_weights(pipe, saved_twice[1 - which])
    assert list(pipe.unet._forward_pre_hooks.values()) == [erasure.hook]  # the router
    with more_hf.routing(pipe, seeds=[0]):
        assert erasure.router == "hash"


def test_a_push_in_between_does_not_mix_commits(cache, saved_twice, monkeypatch):
    download = hub.snapshot_download

    def download_then_pushed(*args, **kwargs):
        folder = download(*args, **kwargs)
        cache.point("main", SECOND)
        return folder

    monkeypatch.setattr(hub, "snapshot_download", download_then_pushed)
    pipe = cache.load()
    assert more_hf.get_erasure(pipe).concepts == ["van gogh"]
    assert same_weights(pipe, saved_twice[0])
    assert more_hf.get_erasure(cache.load()).concepts == ["pablo picasso"]  # control: main did move


@pytest.mark.slow
def test_the_bases_commit_is_recorded(tiny_sd, tmp_path):
    cache = Cache(tmp_path / "cache")
    tiny_sd().save_pretrained(tmp_path / "base")
    cache.add(FIRST, tmp_path / "base")
    cache.point("main", FIRST)
    pipe = DiffusionPipeline.from_pretrained("me/erased", cache_dir=cache.folder)
    erased = more_hf.erase_concept(pipe, "van gogh", remap_to="claude monet")
    folder = more_hf.save(erased, tmp_path / "saved")
    facts = json.loads((folder / "more_hf.json").read_text())["facts"]
    assert (facts["base"], facts["base_revision"]) == ("me/erased", FIRST)


def test_an_erased_repository_is_not_erased_from_again(cache):
    with pytest.raises(more_hf.AlreadyErasedError, match="'van gogh' is already erased"):
        more_hf.erase_concept(cache.load(), "dog", remap_to="cat")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_weights_raise_with_both_fingerprints(cache, saved_twice, tmp_path, dtype):
    assert cache.load(dtype=dtype).unet.dtype == dtype  # a cast is no other weight
    folder = tmp_path / "tampered"
    shutil.copytree(saved_twice[0], folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, SITE: saved_twice[2][SITE]}, folder / WEIGHTS)
    written = json.loads((folder / "more_hf.json").read_text())["edited"]
    both = rf"fingerprint [0-9a-f]{{64}}, .* written for {written}"
    with pytest.raises(more_hf.IncompatibleBaseError, match=both) as raised:
        more_hf.load(folder, dtype=dtype)
    assert str(raised.value).count(written) == 1


@pytest.mark.parametrize(
    "argument", [{"trust_remote_code": True}, {"custom_pipeline": "someone/code"}, {"use_safetensors": False}]
)
def test_no_code_and_no_pickle_by_argument(cache, argument):
    with pytest.raises(more_hf.MoreError, match=f"does not take `{next(iter(argument))}`"):
        cache.load(**argument)


def test_no_pickle_in_place_of_safetensors(saved_twice, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(saved_twice[0], folder)
    torch.save(load_file(folder / WEIGHTS), folder / WEIGHTS.replace(".safetensors", ".bin"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(more_hf.IncompatibleBaseError, match="safetensors"):
        more_hf.load(folder)


def test_no_code_in_the_folder(saved_twice, tmp_path):
    folder = tmp_path / "code"
    shutil.copytree(saved_twice[0], folder)
    (folder / "pipeline.py").write_text("raise SystemExit('code of the folder ran')\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Pipeline"]}))
    with pytest.raises(more_hf.IncompatibleBaseError, match="is no class of diffusers"):
        more_hf.load(folder)


@pytest.mark.slow
def test_the_variant_is_the_records(tiny_sd, tmp_path):
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to="claude monet")
    folder = more_hf.save(pipe, tmp_path / "erased", variant="fp16")
    assert more_hf.get_erasure(more_hf.load(folder)).concepts == ["van gogh"]
    save_file(tiny_sd().unet.state_dict(), folder / WEIGHTS)  # the original's beside it
    assert more_hf.get_erasure(more_hf.load(folder)).concepts == ["van gogh"]
    with pytest.raises(more_hf.IncompatibleBaseError, match="variant"):
        more_hf.load(folder, variant=None)


@pytest.mark.parametrize("missing", ["", "more_hf.json", "model_index.json", WEIGHTS])
def test_files_that_are_not_in_the_cache(cache, missing):
    """No error of the Hub's client, and none at all with every file there."""
    if not missing:
        assert cache.load()
        return
    (cache.repo / "snapshots" / FIRST / missing).unlink()
    with pytest.raises(more_hf.MoreError):
        cache.load()


def test_what_is_not_there(tmp_path):
    with pytest.raises(more_hf.MoreError, match="no folder 'me/nothing', and the cache has not all files"):
        more_hf.load("me/nothing", cache_dir=tmp_path)
    with pytest.raises(more_hf.MoreError, match="There is no folder 'no_such_folder'"):
        more_hf.load("no_such_folder")
