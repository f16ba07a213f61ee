"""The record beside the weights: save, load and verify, and what each refuses."""

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.compare import same, state
from support.pipelines import erase
from transformers import PreTrainedModel, ViTConfig

import more_hf
from more_hf.core.record import RECORD, Record
from more_hf.saving.check import expected_shapes
from more_hf.saving.contents import DELTA


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
BIAS = "conv_in.bias"
SITE = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
LAYOUT = "names and shapes are the base's"
PRESENT = "every edited layer is there"
SAVED = "the edited layers are those that were saved"
EDITED = "each sends p_f where p_t goes"
STRAYS = "no other weights are in the folder"
FILES = "every file is the one that was saved"


def failed(folder):
    return {check for check, passed, _ in more_hf.verify(folder).checks if not passed}


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def original(saved_once):
    return saved_once[1]


def edit_record(folder, **changes):
    record = json.loads((folder / RECORD).read_text("utf-8"))
    record |= changes
    record = {key: value for key, value in record.items() if changes.get(key, 0) is not None}  # None removes
    (folder / RECORD).write_text(json.dumps(record), "utf-8")


def test_record(tiny_sd, tmp_path):
    pipe = erase(tiny_sd(), {"van gogh": ["vincent van gogh"]}, retain=["cat"])
    before = state(pipe.unet)
    folder = more_hf.save(pipe, tmp_path / "erased")

    record = json.loads((folder / RECORD).read_text("utf-8"))
    erasure = more_hf.get_erasure(pipe)
    assert record["more_hf"] == more_hf.__version__
    assert set(record["versions"]) == {"python", "torch", "diffusers", "transformers"}
    assert record["request"] == {
        "concepts": {"van gogh": ["vincent van gogh"]}, "retain": ["cat"], "tokens": "positions",
        "remap_to": {"van gogh": ["claude monet", "johannes vermeer"]}, "solver": "auto", "seed": 0,
        "num_experts": None, "router": None, "pooled": True, "templates": None, "everyday": None,
        "shrinkage": 1e-4, "softness": 1.0, "strength": 1.0, "reach": "name", "pictures": 32, "sampling": {},
        "given": {},
    }  # fmt: skip
    assert Record.read(folder).request == erasure.request
    assert record["sites"] == {name: list(site.read().shape) for name, site in erasure.sites.items()}
    assert len(record["sites"]) == 8
    assert record["facts"]["rank"] == 8
    assert record["facts"]["fingerprint"] == erasure.facts.fingerprint
    assert record["denoiser"] == "unet"
    assert record["facts"]["device"].startswith("cpu (")
    assert record["sources"] == {}  # it was never in a folder
    written = {name: hashlib.sha256(data).hexdigest() for name, data in content(folder).items()}
    del written[RECORD]
    assert record["files"] == written
    assert record["proof"]["other_ways"] == 0.0
    assert not (folder / DELTA).exists()
    assert list(tmp_path.iterdir()) == [folder]
    assert same(pipe.unet, before)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"variant": "fp16"}, id="variant", marks=pytest.mark.slow),
        pytest.param({"max_shard_size": "20KB"}, id="shards", marks=pytest.mark.slow),
        pytest.param({"variant": "fp16", "max_shard_size": "20KB"}, id="both", marks=pytest.mark.slow),
    ],
)
def test_round_trip(tiny_sd, tmp_path, options):
    pipe = erase(tiny_sd())
    folder = more_hf.save(pipe, tmp_path / "erased", **options)
    assert failed(folder) == set()

    loaded = more_hf.load(folder, **{key: value for key, value in options.items() if key == "variant"})
    erasure = more_hf.get_erasure(loaded)
    assert erasure.request == more_hf.get_erasure(pipe).request
    assert erasure.hook is None
    assert str(erasure) == str(more_hf.get_erasure(pipe))
    assert same(loaded.unet, pipe.unet.state_dict())
    with pytest.raises(more_hf.AlreadyErasedError, match="'van gogh' is already erased"):
        erase(loaded, "pablo picasso")
    with pytest.raises(more_hf.AlreadyErasedError):
        more_hf.restore(loaded)
    with pytest.raises(more_hf.AlreadyErasedError), more_hf.disabled(loaded):
        pass
    assert failed(more_hf.save(loaded, tmp_path / "again", **options)) == set()


def test_plainly_loaded_folder_is_known_as_erased(saved):
    pipe = StableDiffusionPipeline.from_pretrained(saved)
    with pytest.raises(more_hf.AlreadyErasedError, match=RECORD):
        erase(pipe, "pablo picasso")


@pytest.mark.slow
def test_the_original_put_back_after_a_save_over_its_own_folder(tiny_sd, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    more_hf.save(erase(pipe), tmp_path / "model")
    assert more_hf.get_erasure(erase(more_hf.restore(pipe), "pablo picasso")).concepts == ["pablo picasso"]


def refit(pipe):
    return erase(erase(pipe), "pablo picasso", remap_to="andy warhol", router="hash")


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        lambda pipe: erase(pipe, remap_to=None),
        lambda pipe: erase(pipe, solver="pinv", tokens="subject+end", retain=["cat", "dog"]),
        lambda pipe: erase(
            pipe, {"van gogh": ["vincent"], "pablo picasso": []}, num_experts=2, seed=3, tokens="last"
        ),
        lambda pipe: erase(pipe, keep_originals=False),
        refit,
        lambda pipe: erase(pipe.to(torch.float16)),
        lambda pipe: erase(pipe.to(torch.bfloat16)),
        lambda pipe: erase(pipe).to(torch.float16),
    ],
    ids=["no_target", "pinv", "aliases", "without_originals", "refit", "float16", "bfloat16", "cast_after"],
)
def test_verify_accepts(tiny_sd, tmp_path, edit):
    assert failed(more_hf.save(edit(tiny_sd()), tmp_path / "erased")) == set()


def test_delta_puts_the_router_back(tiny_sd, tmp_path):
    pipe = erase(tiny_sd(), router="random")
    loaded = more_hf.load(more_hf.save(pipe, tmp_path / "with", include_delta=True))
    z = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))
    with more_hf.routing(pipe, seeds=range(6)), more_hf.routing(loaded, seeds=range(6)):
        routed = more_hf.get_erasure(pipe).hook.route(z)
        assert torch.allclose(more_hf.get_erasure(loaded).hook.route(z), routed)
    assert list(loaded.unet._forward_pre_hooks.values()) == [more_hf.get_erasure(loaded).hook]

    bare = more_hf.load(more_hf.save(pipe, tmp_path / "without"))
    assert more_hf.get_erasure(bare).hook is None
    with pytest.raises(more_hf.MoreError, match="no router"), more_hf.routing(bare, seeds=[0]):
        pass
    with pytest.raises(more_hf.ExportError, match="include_delta=False"):
        more_hf.save(bare, tmp_path / "again", include_delta=True)
    assert not (tmp_path / "again").exists()


def test_save_replaces_the_original(tiny_sd, tmp_path):
    tiny_sd().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("a card")
    folder = more_hf.save(erase(tiny_sd()), tmp_path / "model")
    assert failed(folder) == set()
    assert (folder / "README.md").read_text() == "a card"


def test_save_does_not_leave_an_old_delta(saved):
    pipe = more_hf.load(saved)
    with pytest.raises(more_hf.ExportError, match=DELTA):
        more_hf.save(pipe, saved)


def test_save_needs_an_erasure(tiny_sd, tmp_path):
    pipe = tiny_sd()
    with pytest.raises(more_hf.ExportError, match="Nothing was erased"):
        more_hf.save(pipe, tmp_path / "model")
    with pytest.raises(more_hf.ExportError, match="Nothing was erased"):
        more_hf.save(more_hf.restore(erase(pipe)), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_save_inside_disabled_writes_the_erased_model(tiny_sd, tmp_path):
    pipe = erase(tiny_sd())
    with more_hf.disabled(pipe):
        inside = more_hf.save(pipe, tmp_path / "inside")
        pipe.save_pretrained(tmp_path / "plain")
    outside = more_hf.save(pipe, tmp_path / "outside")
    weights = Path("unet") / "diffusion_pytorch_model.safetensors"
    assert (inside / weights).read_bytes() == (outside / weights).read_bytes()
    assert (tmp_path / "plain" / weights).read_bytes() == (outside / weights).read_bytes()
    assert more_hf.verify(inside).ok


def test_save_refuses_an_unfused_lora(tiny_sd, tmp_path):
    pipe = erase(tiny_sd())
    key = f"unet.{SITE.removesuffix('.weight')}"
    pipe.load_lora_weights(
        {f"{key}.lora_A.weight": torch.ones(1, 32), f"{key}.lora_B.weight": torch.ones(8, 1)},
        adapter_name="style",
    )
    with pytest.raises(more_hf.ExportError, match="unload_lora_weights"):
        more_hf.save(pipe, tmp_path / "model")
    assert not list(tmp_path.iterdir())

    pipe.unload_lora_weights()
    assert failed(more_hf.save(pipe, tmp_path / "model")) == set()


# Controls: what `verify` must not accept.


def without(tensors, name):
    return {other: value for other, value in tensors.items() if other != name}


# what becomes of the denoiser's tensors, given the original's
CHANGED = {
    "put_back_one_layer": (lambda own, original: {**own, SITE: original[SITE]}, {FILES, SAVED, EDITED}),
    "put_back_everything": (lambda own, original: original, {FILES, SAVED, EDITED}),
    "drop_a_layer": (lambda own, _: without(own, SITE), {FILES, LAYOUT, PRESENT, SAVED, EDITED}),
    "drop_another_tensor": (lambda own, _: without(own, BIAS), {FILES, LAYOUT}),
    "reshape_a_layer": (
        lambda own, _: {**own, SITE: own[SITE].repeat(2, 1)},
        {FILES, LAYOUT, PRESENT, SAVED},
    ),
    "reshape_another_tensor": (lambda own, _: {**own, BIAS: own[BIAS].repeat(2)}, {FILES, LAYOUT}),
    # the layers between the first and this one are fine
    "not_finite": (
        lambda own, _: {**own, **{name: own[name] * float("nan") for name in (FIRST, SITE)}},
        {FILES, SAVED, EDITED},
    ),
    "scale_a_layer": (lambda own, _: {**own, SITE: own[SITE] * 1.001}, {FILES, SAVED}),
    "empty_a_layer": (lambda own, _: {**own, SITE: own[SITE] * 0}, {FILES, SAVED, EDITED}),
}


def change(folder, original, name):
    save_file(CHANGED[name][0](load_file(folder / WEIGHTS), original), folder / WEIGHTS)


def test_verify_accepts_what_was_saved(saved):
    verification = more_hf.verify(saved)
    assert verification.ok
    assert [check for check, _, _ in verification.checks] == [FILES, LAYOUT, PRESENT, SAVED, EDITED, STRAYS]
    assert verification.to_markdown().count("| yes ") == 6


@pytest.mark.parametrize("name", CHANGED)
def test_verify_fails(saved, original, name):
    change(saved, original, name)
    assert CHANGED[name][1] <= failed(saved)
    verification = more_hf.verify(saved)
    assert not verification.ok
    assert "| NO " in verification.to_markdown()


def test_verify_fails_without_weights(saved):
    (saved / WEIGHTS).unlink()
    assert {FILES, "the weights can be read"} <= failed(saved)


def test_the_factors_may_be_taken_away(saved):
    (saved / DELTA).unlink()
    assert more_hf.verify(saved)
    (saved / DELTA).write_bytes(b"other factors")
    assert failed(saved) == {FILES}


def test_verify_by_a_run(saved, monkeypatch):
    """A version of diffusers whose denoiser reads the prompt elsewhere, too, is seen only by a run."""
    assert more_hf.verify(saved, run=True)
    forward = UNet2DConditionModel.forward

    def reads_elsewhere(unet, sample, timestep, encoder_hidden_states, **kwargs):
        sample = sample + encoder_hidden_states.mean()
        return forward(unet, sample, timestep, encoder_hidden_states, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", reads_elsewhere)
    assert more_hf.verify(saved)
    verification = more_hf.verify(saved, run=True)
    assert [check.name for check in verification.checks if not check.passed] == [
        "run, nothing else reads the prompt"
    ]


def test_verify_names_the_layer_that_was_put_back(saved, original):
    change(saved, original, "put_back_one_layer")
    assert SITE.removesuffix(".weight") in more_hf.verify(saved).to_markdown()


@pytest.mark.parametrize("read", [more_hf.load, more_hf.verify])
@pytest.mark.parametrize("key", ["request", "sites", "facts", "layout"])
def test_missing_key(saved, read, key):
    edit_record(saved, **{key: None})
    with pytest.raises(more_hf.IncompatibleBaseError, match=key):
        read(saved)


@pytest.mark.slow
def test_more_retained_names_than_fit_into_the_space(tiny_sd, tmp_path):
    pipe = erase(tiny_sd(), retain=["cat", "dog", "house", "tree", "car", "person"])  # covariance alone can
    assert more_hf.verify(more_hf.save(pipe, tmp_path / "erased")).ok
    assert more_hf.get_erasure(more_hf.load(tmp_path / "erased")).request.retain[0] == "cat"


@pytest.mark.parametrize("read", [more_hf.load, more_hf.verify])
def test_unknown_key_only_warns(saved, caplog, read):
    edit_record(saved, colour="blue")
    with caplog.at_level(logging.WARNING, logger="more_hf"):
        assert read(saved)
    assert "colour" in caplog.text


@pytest.mark.parametrize("read", [more_hf.load, more_hf.verify])
def test_no_record(saved, read):
    (saved / RECORD).unlink()
    with pytest.raises(more_hf.MoreError, match=f"no {RECORD}"):
        read(saved)


def test_record_of_another_model(saved):
    edit_record(saved, sites={"conv_in": [4, 4]})
    with pytest.raises(more_hf.IncompatibleBaseError, match="other layers"):
        more_hf.load(saved)


def test_a_router_without_its_factors_is_warned_of_and_not_reported(tiny_sd, tmp_path, caplog):
    options = {"remap_to": ["claude monet", "andy warhol"], "router": "hash"}
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", **options)
    folder = more_hf.save(pipe, tmp_path / "erased")
    assert "The 'hash' router is not saved" in caplog.text
    erasure = more_hf.get_erasure(more_hf.load(folder))
    assert erasure.router is None
    assert dict(erasure.rows())["router"].startswith("none")
    caplog.clear()
    folder = more_hf.save(pipe, tmp_path / "erased", include_delta=True)
    assert "router" not in caplog.text
    assert dict(more_hf.get_erasure(more_hf.load(folder)).rows())["router"] == "hash"


class Computed(PreTrainedModel):
    """A model that computes with its weights while it is built, which stand-ins without numbers cannot."""

    config_class = ViTConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(2, 3) * self.layer.weight.detach())


def test_the_shapes_of_a_model_that_needs_its_weights_to_be_built():
    torch.manual_seed(0)
    model, drawn = Computed(ViTConfig()), torch.random.get_rng_state()
    found = expected_shapes(model)
    assert found == {"layer.weight": [2, 3], "layer.bias": [2], "scale": [2, 3]}
    assert torch.equal(torch.random.get_rng_state(), drawn)
