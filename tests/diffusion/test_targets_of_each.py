"""`remap_to` as a mapping: every concept goes to its own targets, and every verb afterwards knows it."""

import pytest
import torch

import more_hf
from more_hf.core.record import Record
from more_hf.core.request import ConceptRequest
from more_hf.diffusion.compare import target_prompt
from more_hf.diffusion.encoder import column
from more_hf.saving.card import make_card


CONCEPTS = ["van gogh", "cat"]
TARGETS = {"cat": "dog", "van gogh": ["claude monet"]}  # in another order than the concepts
REPORTED = "van gogh → claude monet; cat → dog"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
EXACT = 1e-4


def distance(pipe, original, name, target):
    """How far an edited layer's answer to a name is from the original's to the target; 1 is its length."""
    prototypes = more_hf.get_erasure(pipe).remap.prototypes
    names = [form for form in prototypes.names if form.startswith(column(name, ""))]
    forgotten = torch.stack([prototypes[form] for form in names]).float()
    wanted = torch.zeros_like(forgotten)
    if target is not None:
        kinds = [form.removeprefix(column(name, "")) for form in names]
        wanted = torch.stack([prototypes[column(target, kind)] for kind in kinds]).float()
    edited, before = (part.unet.get_submodule(LAYER).weight.detach() for part in (pipe, original))
    return float((forgotten @ edited.T - wanted @ before.T).norm() / (forgotten @ before.T).norm())


@pytest.fixture
def original(tiny_sd):
    return tiny_sd()


@pytest.fixture
def erased(tiny_sd):
    return more_hf.erase_concept(tiny_sd(), CONCEPTS, remap_to=TARGETS, tokens="last", solver="covariance")


def test_every_concept_goes_to_its_own_target(erased, original):
    assert distance(erased, original, "van gogh", "claude monet") < EXACT
    assert distance(erased, original, "cat", "dog") < EXACT
    assert distance(erased, original, "cat", "claude monet") > 100 * EXACT
    assert ("sent to", REPORTED) in more_hf.get_erasure(erased).rows()


def test_a_mapping_to_one_target_is_that_target(tiny_sd):
    same = more_hf.erase_concept(tiny_sd(), CONCEPTS, remap_to=dict.fromkeys(CONCEPTS, "dog"))
    plain = more_hf.erase_concept(tiny_sd(), CONCEPTS, remap_to="dog")
    own = more_hf.erase_concept(tiny_sd(), CONCEPTS, remap_to=TARGETS, tokens="last", solver="covariance")
    weights = [pipe.unet.state_dict() for pipe in (same, plain, own)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_none_projects_one_concept_out(tiny_sd, original):
    remap_to = {"cat": None, "van gogh": "dog"}
    pipe = more_hf.erase_concept(tiny_sd(), CONCEPTS, remap_to=remap_to, solver="covariance")
    assert distance(pipe, original, "cat", None) < EXACT
    assert distance(pipe, original, "van gogh", "dog") < EXACT


def test_a_refit_and_a_restore_keep_the_others_targets(erased, original):
    more_hf.erase_concept(erased, "house", remap_to={"house": "tree"}, tokens="last", solver="covariance")
    assert distance(erased, original, "house", "tree") < EXACT
    assert distance(erased, original, "cat", "dog") < EXACT
    more_hf.restore(erased, "van gogh")
    assert more_hf.get_erasure(erased).request.remap_to == {"cat": ("dog",), "house": ("tree",)}
    assert distance(erased, original, "cat", "dog") < EXACT


def test_saved_verified_and_shown(erased, tmp_path):
    record = Record.read(more_hf.save(erased, tmp_path / "erased"))
    assert record.request.remap_to == {"van gogh": ("claude monet",), "cat": ("dog",)}
    assert more_hf.verify(tmp_path / "erased")
    assert REPORTED in make_card(record, "me/model")
    assert target_prompt("a cat by van gogh", record.request) == "a dog by claude monet"


def test_aliases_go_where_their_concept_goes(tiny_sd, original):
    concepts = {"van gogh": ["vincent"], "cat": []}
    pipe = more_hf.erase_concept(tiny_sd(), concepts, remap_to=TARGETS, tokens="last", solver="covariance")
    assert distance(pipe, original, "vincent", "claude monet") < EXACT


@pytest.mark.parametrize(
    ("remap_to", "message"),
    [
        ({"van gogh": "dog"}, "no target for 'cat'"),
        ({}, "no target for 'van gogh', 'cat'"),
        ({**TARGETS, "Cat": "dog"}, "a target for 'Cat', which is not forgotten.*'van gogh', 'cat'"),
        ({**TARGETS, "cat": []}, "`remap_to` is empty"),
        ({**TARGETS, "cat": 3}, "a name or a list of names"),
        ({**TARGETS, 3: "dog"}, "a name or a list of names"),
        ({**TARGETS, "cat": "van gogh"}, "'van gogh' is both erased and in `remap_to`"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tiny_sd, remap_to, message):
    pipe = tiny_sd()
    with pytest.raises(more_hf.PrototypeError, match=message):
        more_hf.erase_concept(pipe, CONCEPTS, remap_to=remap_to)
    assert more_hf.get_erasure(pipe) is None


def test_json_gives_the_request_back():
    request = ConceptRequest.of(CONCEPTS, remap_to=TARGETS)
    assert ConceptRequest.from_dict(request.to_dict()) == request
