"""Names that cannot be meant are refused before anything is touched; names that only look alike are not."""

import pytest
from support.compare import same, state

import more_hf
from more_hf.diffusion.encoder import Encoder


WRONG = {
    "target_is_forgotten": ({"remap_to": "van gogh"}, "'van gogh' is both erased and in `remap_to`"),
    "target_is_forgotten_in_other_case": (
        {"remap_to": ["claude monet", "Van GOGH"]},
        "'Van GOGH' is both erased and in `remap_to`",
    ),
    "retained_is_forgotten": ({"retain": ["VAN GOGH"]}, "'VAN GOGH' is both erased and in `retain`"),
    "target_is_alias": (
        {"concepts": {"van gogh": ["vincent"]}, "remap_to": "Vincent"},
        "'Vincent' is both erased and in `remap_to`",
    ),
    "retained_is_alias": (
        {"concepts": {"van gogh": "vincent"}, "retain": ["VINCENT"]},
        "'VINCENT' is both erased and in `retain`",
    ),
    "retained_contains_forgotten": (
        {"retain": ["Vincent Van Gogh"]},
        r"'Vincent Van Gogh' in `retain` contains 'van gogh'.*alias, "
        r"concepts=\{'van gogh': \['Vincent Van Gogh'\]\}",
    ),
    "target_contains_forgotten": ({"remap_to": "school of (van gogh)"}, "contains 'van gogh'.*alias"),
    "retained_contains_alias": (
        {"concepts": {"van gogh": ["vincent"]}, "retain": ["Vincent's house"]},
        "contains 'vincent'.*alias",
    ),
    "blank_concept": ({"concepts": " "}, "' ' is not a name"),
    "empty_concept": ({"concepts": ""}, "'' is not a name"),
    "blank_alias": ({"concepts": {"van gogh": [""]}}, "'' is not a name"),
    "blank_target": ({"remap_to": ["claude monet", "\t"]}, "is not a name"),
    "blank_retained": ({"retain": [""]}, "is not a name.*always retained"),
    "twice": ({"concepts": ["van gogh", "Van Gogh"]}, "'van gogh' is given twice"),
    "alias_twice": ({"concepts": {"van gogh": ["vincent", "Vincent"]}}, "'vincent' is given twice"),
    "alias_of_two": (
        {"concepts": {"van gogh": ["vincent"], "pablo picasso": ["vincent"]}},
        "'vincent' is given twice",
    ),
    "alias_is_name": ({"concepts": {"van gogh": ["VAN GOGH"]}}, "is given twice"),
    "no_concepts": ({"concepts": []}, "`concepts` is empty"),
    "no_concepts_in_mapping": ({"concepts": {}}, "`concepts` is empty"),
    "no_targets": ({"remap_to": []}, "`remap_to` is empty.*remap_to=None"),
    "tokens": ({"tokens": "words"}, "Unknown tokens 'words'. Choose one of 'positions'"),
    "solver": ({"solver": "lstsq"}, "Unknown solver 'lstsq'. Choose one of 'auto', 'pinv', 'covariance'"),
    "router": ({"router": "roulette"}, "Unknown router 'roulette'. Choose one of None, 'random', 'hash'"),
    "no_experts": ({"num_experts": 0}, "`num_experts` must be at least 1, got 0"),
    "negative_experts": ({"num_experts": -2}, "`num_experts` must be at least 1, got -2"),
    "too_long": ({"concepts": "van gogh " * 50}, "too long"),
    "too_long_target": ({"remap_to": "claude monet " * 50}, "too long"),
    "same_tokens": ({"remap_to": "van  gogh"}, "No exact edit exists.*'van  gogh.*cosine 1.0000"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_leave_the_pipeline_untouched(tiny_sd, case):
    pipe, (arguments, message) = tiny_sd(), WRONG[case]
    before = state(pipe)
    with pytest.raises(more_hf.PrototypeError, match=message):
        more_hf.erase_concept(pipe, **{"concepts": "van gogh", "remap_to": "claude monet", **arguments})
    assert same(pipe, before)
    assert more_hf.get_erasure(pipe) is None
    assert not pipe.unet._forward_pre_hooks


def test_wrong_names_leave_an_earlier_erasure_in_force(tiny_sd):
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to="claude monet", router="random")
    erasure, before = more_hf.get_erasure(pipe), state(pipe)
    wrong = {"claude monet": "johannes vermeer", "pablo picasso": "van gogh", "Van Gogh": "andy warhol"}
    for concepts, remap_to in wrong.items():
        with pytest.raises(more_hf.PrototypeError):
            more_hf.erase_concept(pipe, concepts, remap_to=remap_to)
    assert more_hf.get_erasure(pipe) is erasure
    assert erasure.concepts == ["van gogh"]
    assert same(pipe, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"concepts": "gogh", "retain": ["Vangogh Museum", "goghs"]},
        {"concepts": "van gogh", "retain": ["Van Goghs", "vangogh"]},
        {"remap_to": None},
        {"remap_to": ("claude monet",), "retain": ["claude monet", "cat", "cat"]},
        {"concepts": {"van gogh": ["vincent van gogh"]}},
        {"concepts": "vincent van gogh", "retain": ["vincent"]},
        {"concepts": {"van gogh": "vincent"}, "num_experts": 3, "tokens": "last"},
    ],
    ids=lambda arguments: ",".join(arguments),
)
def test_names_that_are_fine(tiny_sd, arguments):
    defaults = {"concepts": "van gogh", "remap_to": "claude monet"}
    pipe = more_hf.erase_concept(tiny_sd(), **{**defaults, **arguments})
    assert more_hf.get_erasure(pipe) is not None


def test_shared_first_tokens_are_reported_with_their_leak(tiny_sd):
    pipe = tiny_sd()
    z = Encoder(pipe).encode(["kelly clarkson"])[0, 1:2].double()
    more_hf.erase_concept(pipe, "kelly mckernan", remap_to="andy warhol", retain=["kelly clarkson", "cat"])
    erasure = more_hf.get_erasure(pipe)

    moved = 100 * float((erasure.remap.apply(z) - z).norm() / z.norm())
    leak = (
        "'kelly clarkson' starts with the same 1 token(s) as 'kelly mckernan', "
        f"which have the same vectors there; they move by {moved:.1f} %"
    )
    assert moved > 0.1
    assert leak in erasure.facts.leaks
    assert leak in erasure.to_markdown()
    assert not [leak for leak in erasure.facts.leaks if "'cat'" in leak or "'andy warhol'" in leak]


@pytest.mark.slow
def test_clip_skip_is_a_stated_leak(tiny_sd):
    pipe = more_hf.erase_concept(tiny_sd(), "van gogh", remap_to=None)
    assert "clip_skip" in more_hf.get_erasure(pipe).to_markdown()
