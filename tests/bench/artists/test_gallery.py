from types import SimpleNamespace

import pytest

from more_hf_bench.artists.gallery import _judged


@pytest.mark.parametrize(
    ("judged", "thing", "text"),
    [
        (("Fluent", 1), "cat", ["taken for Fluent", "cat recognised"]),
        (("Fluent", 0), "", ["taken for Fluent", "content not recognised"]),
        (("", None), "cat", []),
    ],
)
def test_captions_say_what_the_judges_see(judged, thing, text):
    assert _judged(SimpleNamespace(judged=lambda when: judged, thing=thing), "after") == text
