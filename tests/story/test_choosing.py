"""Somebody chooses: what is reported, what each row means, what is warned of, what cannot be opened."""

import pytest

import more_hf


@pytest.mark.slow
def test_what_is_reported_and_what_it_means(copy_of_emoji_sd, tmp_path, caplog):
    targets, retain = ["Fluent", "Twemoji"], ["Blobmoji", "Monotone", "dog face"]
    pipe = more_hf.erase_concept(copy_of_emoji_sd(), "Noto", remap_to=targets, router="hash", retain=retain)
    erasure = more_hf.get_erasure(pipe)
    assert erasure.facts.retained_moved.keys() == set(retain)
    assert "although retained" not in caplog.text  # they move as other prompts do
    assert "To rounding" in " ".join(str(erasure).split())
    for name, _ in erasure.rows():
        assert f"| {name} |" in erasure.explain()

    folder = more_hf.save(pipe, tmp_path / "erased")
    assert "'hash' router is not saved" in caplog.text
    loaded = more_hf.load(folder)
    assert more_hf.get_erasure(loaded).router is None
    assert more_hf.verify(folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(more_hf.MoreError, match="There is no folder 'no_such_folder'"):
        more_hf.load("no_such_folder")
