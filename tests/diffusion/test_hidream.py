"""HiDream, whose blocks read single layers of Llama: each layer is a space with prototypes of its own."""

import pytest
import torch
from support.bare import FORGET, LENGTHS, OTHER, TARGET, build_bare, erase, read_by_layers, use_bare_names
from support.compare import same
from support.families import TINY, copied, shorten, weights
from support.families import erase as erase_names

import more_hf
from more_hf.core.views import experts_forced, routing_off
from more_hf.diffusion.encoder import Encoder, kinds_of
from more_hf.diffusion.sites import find_denoiser, text_of


SPACES = TINY["hidream"].sites
LLAMA = ["tokens of layer 0", "tokens of layer 2", "tokens of layer 3"]


@pytest.fixture(autouse=True)
def bare_names(monkeypatch):
    use_bare_names(monkeypatch, LENGTHS)


@pytest.fixture(scope="module")
def original():
    """Not to be modified."""
    return build_bare("hidream")


def test_every_layer_of_llama_has_prototypes_of_its_own(original):
    erasure = more_hf.get_erasure(erase(copied(original)))
    assert list(erasure.remaps) == ["tokens", *LLAMA, "pooled"]
    assert erasure.facts.spaces == {name: space for name, space in SPACES.items() if space != "tokens"}
    first, second = (erasure.remaps[space].prototypes[f"{FORGET} · last"] for space in LLAMA[:2])
    assert (first - second).norm() > 0.1 * first.norm()


def test_the_report_has_the_dearest_layer_and_the_worst_guarantee(original):
    erasure = more_hf.get_erasure(erase(copied(original)))
    moved = {space: erasure.remaps[space].ordinary_moved for space in LLAMA}
    dearest = max(moved, key=moved.get)
    reasons = erasure.facts.solver_reason.split("; ")
    chosen = [reason.split(":")[0] for reason in reasons if ": pinv" in reason]
    assert chosen == [f"{dearest}, the most expensive of 3", "pooled"]
    assert erasure.guarantees["layers_ordinary_moved"] == pytest.approx(moved[dearest])
    for key in ("forget_to_target", "remain_fixed", "idempotent", "nothing_left"):
        assert erasure.guarantees[f"layers_{key}"] < 1e-8


def test_layers_are_routed_as_a_tensor_as_a_list_and_by_position(original):
    pipe = erase(copied(original), remap_to=[TARGET, OTHER], router="random")
    erasure, transformer = more_hf.get_erasure(pipe), pipe.transformer
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 4, 4), (1, 5, 48), (4, 1, 5, 64), (1, 40)
    latent, t5, llama, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    given, time = llama.clone(), torch.tensor([500.0])
    with torch.no_grad(), experts_forced(erasure, torch.tensor([1])):
        found = transformer(latent, time, t5, llama, pooled).sample
        names = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds")
        for layers in (llama, list(llama)):
            named = dict(zip(names, (t5, layers, pooled), strict=True))
            assert torch.equal(transformer(latent, timesteps=time, **named).sample, found)
        # the same by hand, on the merged weights alone
        moved = {space: erasure.remaps[space].apply for space in erasure.remaps}
        for i in (0, 2, 3):
            llama[i] = moved[f"tokens of layer {i}"](given[i].double(), 1).float()
        by_hand = moved["tokens"](t5.double(), 1).float(), llama, moved["pooled"](pooled.double(), 1).float()
        with routing_off(erasure):
            wanted = transformer(latent, time, *by_hand).sample
            unrouted = transformer(latent, time, t5, given, pooled).sample
    assert (found - wanted).norm() < 1e-3 * (unrouted - wanted).norm()


def test_what_is_given_is_not_written_to(original):
    pipe = erase(copied(original), remap_to=[TARGET, OTHER], router="hash")
    llama = torch.ones(4, 1, 5, 64)
    given = torch.ones(1, 4, 4, 4), torch.tensor([500.0]), torch.ones(1, 5, 48)
    with torch.no_grad():
        pipe.transformer(*given, llama, torch.ones(1, 40))
    assert torch.equal(llama, torch.ones(4, 1, 5, 64))


def test_without_an_end_token_the_padding_stands_for_the_prompt(original):
    kinds = kinds_of(text_of(original, find_denoiser(original)), "last+end", pooled=True)
    expected = {"tokens": ["last", "end"], **dict.fromkeys(LLAMA, ["last", "padding"])}
    assert kinds == {**expected, "pooled": ["pooled"]}


def test_padding_in_front_has_read_nothing_and_is_no_prototype(original):
    """Some copies of Llama's tokenizer pad on the left."""
    original.tokenizer_4.padding_side = "left"
    try:
        encoder = Encoder(original)
        (segment,) = [segment for segment in encoder.text.segments if segment.layers]
        assert segment.left
        read = {name: read_by_layers(original, "hidream", name) for name in (FORGET, TARGET)}
        P = more_hf.get_erasure(erase(copied(original))).remaps[LLAMA[1]].prototypes
    finally:
        original.tokenizer_4.padding_side = "right"
    site = "caption_projection.1.linear"
    forget, target = (read[name][site] for name in (FORGET, TARGET))
    assert torch.equal(forget[0], target[0])
    assert torch.allclose(P[f"{FORGET} · last"], forget[2], rtol=1e-4, atol=1e-5)
    assert [name for name in P.names if name.startswith(FORGET)] == [f"{FORGET} · last"]


def test_names_that_begin_alike_share_vectors_in_llama(original, monkeypatch):
    shorten(monkeypatch)  # the names have several tokens
    options = {"retain": ["kelly clarkson"], "solver": "covariance", "tokens": "last"}
    pipe = erase_names(copied(original), "kelly mckernan", **options)
    erasure = more_hf.get_erasure(pipe)
    leaks = [leak for leak in erasure.facts.leaks if leak.startswith("'kelly clarkson' starts with the same")]
    features = Encoder(original).features(["kelly clarkson", "kelly mckernan"])
    assert len(leaks) == 1
    assert "starts with the same 1 token(s) as 'kelly mckernan'" in leaks[0]
    shared = {space: features[space][:, 1] for space in LLAMA}
    assert all(torch.allclose(*z, atol=1e-5) for z in shared.values())
    moved = max(erasure.remaps[space].moved(z[0]) for space, z in shared.items())
    assert f"they move by {100 * moved:.1f} %" in leaks[0]


def test_inside_the_denoiser_its_experts_cannot_be_recorded(original):
    pipe = copied(original)
    before = weights(pipe)
    with pytest.raises(more_hf.SiteNotFoundError, match="feed-forward experts"):
        erase(pipe, reach="denoiser", sampling={"num_inference_steps": 2})
    assert same(pipe.transformer, before)
