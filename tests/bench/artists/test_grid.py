from types import SimpleNamespace

from more_hf_bench.artists.grid import _target_of


def test_the_target_is_drawn_with_the_same_thing():
    asked = SimpleNamespace(artist="Noto", thing="cat", remap_to="Fluent")
    others = [SimpleNamespace(artist="Fluent", thing=thing, remap_to="Fluent") for thing in ("dog", "cat")]
    assert _target_of(asked, [asked, *others]) is others[1]
    assert _target_of(asked, [asked, others[0]]) is None
    assert _target_of(SimpleNamespace(artist="Noto", thing="", remap_to="Fluent"), others) is None
