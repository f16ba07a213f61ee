"""Many concepts at once: what `auto` takes, and that a soft edit has everything that an exact one has."""

import itertools

import pytest
import torch
from safetensors.torch import load_file
from support.records import read_record, with_original, write_record

import more_hf
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.encoder import Encoder
from more_hf.diffusion.plan import solve
from more_hf.saving.check import SOFT_SHARE
from more_hf_bench.artists.config import KINDS
from more_hf_bench.artists.prompts import read_prompts


NAMES = ["van gogh", "pablo picasso", "cat", "dog", "house", "tree", "car"]
THINGS = ["cat face", "dog face", "rocket", "pizza", "guitar", "sunflower", "key", "bell", "fish", "house"]
THINGS += ["bicycle", "lemon", "ant", "crab"]
REMAPPED = "each sends p_f most of the way"
OPTIONS = {"remap_to": "claude monet", "retain": ["andy warhol"]}


@pytest.fixture(scope="module")
def soft():
    from support.pipelines import build_tiny_sd

    return more_hf.erase_concept(build_tiny_sd(), NAMES, **OPTIONS)


def test_one_is_exact_and_many_are_soft(tiny_sd, soft):
    one = more_hf.get_erasure(more_hf.erase_concept(tiny_sd(), NAMES[0], **OPTIONS))
    assert one.facts.solver in ("pinv", "covariance")
    assert one.facts.tokens is None
    many = more_hf.get_erasure(soft)
    assert many.facts.solver == "soft"
    assert many.facts.tokens is None  # all kinds
    assert many.facts.rank == 4 * len(NAMES)
    assert "exact with last+end would move them by" in many.facts.solver_reason
    assert "measured `way_left`" in many.to_markdown()


def test_the_softer_edit_moves_ordinary_prompts_less(tiny_sd, soft):
    exact = more_hf.erase_concept(tiny_sd(), NAMES, solver="covariance", tokens="last+end", **OPTIONS)
    moved = [more_hf.get_erasure(pipe).guarantees["ordinary_moved"] for pipe in (soft, exact)]
    assert 0 < moved[0] < moved[1]


def test_softness_is_a_dial(tiny_sd, soft):
    """The larger, the less ordinary prompts move and the more of the way is left."""
    options = {"solver": "soft", "softness": 4.0, **OPTIONS}
    softer = more_hf.erase_concept(tiny_sd(), NAMES, **options)
    one, four = (more_hf.get_erasure(pipe).guarantees for pipe in (soft, softer))
    assert 0 < four["ordinary_moved"] < 0.9 * one["ordinary_moved"]
    assert four["way_left"] > 1.1 * one["way_left"]


@pytest.mark.slow
def test_a_long_list_takes_fewer_prototypes(emoji_sd):
    things = read_prompts("emoji108", KINDS["things"]).names
    targets = dict(zip(things[:60], itertools.cycle(things[60:66]), strict=False))

    def solved(**options):
        request = ConceptRequest.of(list(targets), remap_to=targets, **options)
        return solve(Encoder.of(emoji_sd, request), request)

    wide, few, chosen = solved(solver="soft"), solved(solver="soft", tokens="last+end"), solved()
    assert few.ordinary_moved < wide.ordinary_moved
    assert wide.ordinary_moved > 0.2
    assert chosen.tokens == "last+end"
    assert chosen.ordinary_moved == pytest.approx(few.ordinary_moved, rel=1e-6)


@pytest.mark.parametrize(("names", "far"), [(NAMES[:3], False), (NAMES, True)])
def test_what_moves_ordinary_prompts_far_is_warned_of(tiny_sd, caplog, names, far):
    erasure = more_hf.get_erasure(more_hf.erase_concept(tiny_sd(), names, **OPTIONS))
    assert (erasure.guarantees["ordinary_moved"] > 0.2) == far
    assert ("often show nothing in particular" in caplog.text) == far


def test_every_name_may_have_a_target_of_its_own(tiny_sd):
    targets = ["claude monet", "andy warhol", "painting", "sky", "sea", "bird", "boat"]
    pipe = more_hf.erase_concept(tiny_sd(), NAMES, remap_to=dict(zip(NAMES, targets, strict=True)))
    erasure = more_hf.get_erasure(pipe)
    assert erasure.facts.solver == "soft"
    assert erasure.guarantees["way_left"] < 1


@pytest.mark.parametrize("softness", [-1, float("inf"), float("nan")])
def test_a_softness_that_is_none(tiny_sd, softness):
    with pytest.raises(more_hf.PrototypeError, match="`softness`"):
        more_hf.erase_concept(tiny_sd(), NAMES, softness=softness, **OPTIONS)


def test_a_router_stays_exact(tiny_sd):
    pipe = more_hf.erase_concept(
        tiny_sd(), NAMES[:3], remap_to=["claude monet", "andy warhol"], router="random"
    )
    assert more_hf.get_erasure(pipe).guarantees["nothing_left"] < 1e-9
    with pytest.raises(more_hf.PrototypeError, match="No exact edit exists"):
        more_hf.erase_concept(tiny_sd(), [*NAMES, *"abcdefghijklm"], **OPTIONS, router="random")


def test_restored_bit_for_bit(tiny_sd):
    pipe = tiny_sd()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    more_hf.erase_concept(pipe, NAMES, **OPTIONS)
    assert not all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    more_hf.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def failed(folder):
    return [check.name for check in more_hf.verify(folder).checks if not check.passed]


@pytest.mark.parametrize(
    ("names", "remap_to", "share"),
    [
        (NAMES, "claude monet", 0.1),
        (NAMES[:2], "claude monet", 0.18),
        (NAMES[1:3], ["a painting", "sky", "sea", "bird"], 0.5),
    ],
)
def test_a_soft_edit_is_told_from_the_original(tiny_sd, tmp_path, names, remap_to, share):
    """Also where it removes no direction nearly whole: the record cannot say how much may be left."""
    pipe = tiny_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    more_hf.erase_concept(pipe, names, remap_to=remap_to, solver="soft")
    assert share / 2 < more_hf.get_erasure(pipe).remap.removed(SOFT_SHARE).share < share
    folder = more_hf.save(pipe, tmp_path / "soft")
    assert more_hf.verify(folder)
    with_original(folder, original)
    assert failed(folder) == [REMAPPED]


@pytest.mark.slow
def test_one_layer_of_the_original_is_noticed(tiny_sd, tmp_path):
    pipe = tiny_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    folder = more_hf.save(more_hf.erase_concept(pipe, NAMES, **OPTIONS), tmp_path / "soft")
    erased = load_file(next((folder / "unet").glob("*.safetensors")))
    for site in more_hf.get_erasure(pipe).sites:
        with_original(folder, {**erased, f"{site}.weight": original[f"{site}.weight"]})
        assert failed(folder) == [REMAPPED]


def test_a_record_of_a_softer_edit_does_not_vouch_for_the_original(tiny_sd, tmp_path):
    """How soft an edit may be is the code's to say."""
    pipe = tiny_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    folder = more_hf.save(more_hf.erase_concept(pipe, NAMES, **OPTIONS), tmp_path / "soft")
    with_original(folder, original)
    record = read_record(folder)
    record["request"]["shrinkage"] = 1000
    write_record(folder, record)
    assert failed(folder) == [REMAPPED]
    assert "(limit 0)" in more_hf.verify(folder).failures


@pytest.mark.slow
def test_a_folder_is_verified_and_the_originals_weights_are_not(tmp_path):
    pipe = more_hf.load_emoji_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    more_hf.erase_concept(pipe, THINGS, remap_to="eye")
    folder = more_hf.save(pipe, tmp_path / "soft")
    assert more_hf.get_erasure(more_hf.load(folder)).facts.solver == "soft"
    verification = more_hf.verify(folder)
    assert verification
    assert "is left" in verification.to_markdown()
    with_original(folder, original)
    assert failed(folder) == [REMAPPED]
    assert more_hf.save_checkpoint(pipe, tmp_path / "soft.safetensors").exists()


def test_a_retained_name_that_moves_far_is_warned_of(tiny_sd, caplog):
    options = {"remap_to": "claude monet", "retain": ["van goghs"]}
    more_hf.erase_concept(tiny_sd(), "van gogh", solver="pinv", **options)
    assert "although retained" not in caplog.text
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", solver="covariance", **options)
    erasure = more_hf.get_erasure(pipe)
    moved = erasure.facts.retained_moved["van goghs"]
    assert moved > max(erasure.guarantees["ordinary_moved"], 0.12)
    assert f"van goghs ({100 * moved:.1f} %): moves farther" in caplog.text
