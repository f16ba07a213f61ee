"""`strength` scales the change of every weight, and nothing that is said of it is said of the whole edit."""

import pytest
import torch
from support.records import read_record, with_original, write_record

import more_hf
from more_hf.core.request import ConceptRequest


INSIDE = {"reach": "denoiser", "pictures": 2, "sampling": {"num_inference_steps": 2, "height": 8, "width": 8}}
CASES = {
    "exact": {"concepts": "van gogh"},
    "soft": {"concepts": ["van gogh", "cat"], "solver": "soft"},
    "inside": {"concepts": "van gogh", **INSIDE},
}


def erase(pipe, concepts="van gogh", **options):
    pipe = more_hf.erase_concept(pipe, concepts, remap_to="claude monet", **options)
    return more_hf.get_erasure(pipe)


def changes(erasure):
    return {name: site.read() - erasure.originals[name] for name, site in erasure.sites.items()}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_every_change_is_a_multiple_of_the_whole_one(tiny_sd, case):
    whole = changes(erase(tiny_sd(), **CASES[case]))
    for strength in (0.4, 1.3):
        erasure = erase(tiny_sd(), strength=strength, **CASES[case])
        scaled = changes(erasure)
        assert scaled.keys() == whole.keys()
        for name, change in scaled.items():
            assert float((change - strength * whole[name]).norm()) < 1e-3 * float(whole[name].norm()), name
        assert erasure.proof["layer_error"] < 4 < erasure.proof["layer_changed"]


@pytest.mark.parametrize("strength", [0.6, 1.4])
def test_what_is_said_of_it(tiny_sd, tmp_path, strength):
    pipe = tiny_sd()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    erasure = erase(pipe, strength=strength)
    assert erasure.guarantees["way_left"] == pytest.approx(0.4)
    assert "nothing_left" not in erasure.guarantees
    assert "At worst, they end 40 % of the way from it" in erasure.to_markdown()

    # "whoever knows the names can undo it from the weights alone", which nobody can at strength 1
    E = torch.eye(len(erasure.remap.prototypes.matrix)).double() + erasure.remap.shift() @ erasure.remap.D_F
    for name, original in erasure.originals.items():
        undone = torch.linalg.solve(E.T, erasure.sites[name].read().double().T).T
        assert torch.allclose(undone.float(), original, atol=1e-4)

    folder = more_hf.save(pipe, tmp_path / "scaled", include_delta=True)
    check = f"each sends p_f {strength:g} of the way"
    assert check in [check.name for check in more_hf.verify(folder).checks]
    assert more_hf.verify(folder)
    assert more_hf.get_erasure(more_hf.load(folder)).remap.strength == strength
    with_original(folder, before)
    assert check in more_hf.verify(folder).failures


def test_what_cannot_be_told_from_the_original_is_not_saved(tiny_sd, tmp_path):
    pipe = tiny_sd()
    erase(pipe, strength=0.4)
    with pytest.raises(more_hf.ExportError, match="strength of at least 0.5"):
        more_hf.save(pipe, tmp_path / "weak")
    assert more_hf.save_lora(pipe, tmp_path / "weak").is_file()
    # nor does a record that says so vouch for anything
    folder = more_hf.save(more_hf.erase_concept(tiny_sd(), "cat", remap_to="dog"), tmp_path / "whole")
    record = read_record(folder)
    record["request"]["strength"] = 0.4
    write_record(folder, record)
    assert "At strength 0.4" in more_hf.verify(folder).failures


@pytest.mark.parametrize("strength", [0, -1, 1.6, float("nan")])
def test_out_of_range(strength):
    with pytest.raises(more_hf.PrototypeError, match="`strength`"):
        ConceptRequest.of("cat", remap_to="dog", strength=strength)


def test_a_router_needs_the_whole_edit():
    with pytest.raises(more_hf.PrototypeError, match="A router needs the whole edit"):
        ConceptRequest.of("cat", remap_to="dog", strength=0.7, router="hash")


@pytest.mark.slow
def test_the_weakest_edit_of_the_embedded_pipeline_is_saved(copy_of_emoji_sd, tmp_path):
    pipe = more_hf.erase_concept(copy_of_emoji_sd(), "Blobmoji", remap_to="Fluent", strength=0.5)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    folder = more_hf.save(pipe, tmp_path / "weakest")
    more_hf.restore(pipe)
    with_original(folder, pipe.unet.state_dict())
    assert not more_hf.verify(folder)
    with_original(folder, before)
    assert more_hf.verify(folder)
