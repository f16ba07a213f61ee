import numpy as np
import pytest
from PIL import Image

from more_hf.diffusion.grid import draw_grid, stack


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_pictures_stand_in_rows_and_a_missing_one_leaves_its_place_white():
    red, green, blue = (Image.new("RGB", (8, 8), colour) for colour in COLOURS)
    sheet = draw_grid({"": [red, green], " ": [None, blue]}, scale=4)
    left, cell = sheet.width - 2 * 36, 36
    centres = [(left + 16 + cell * column, 4 + 16 + cell * row) for row in range(2) for column in range(2)]
    white = (255, 255, 255)
    assert [sheet.getpixel(centre) for centre in centres] == [*COLOURS[:2], white, COLOURS[2]]


def test_labels_make_room_for_themselves():
    pictures = [Image.effect_noise((16, 16), 50).convert("RGB")] * 2
    plain = draw_grid({"": pictures}, scale=4)
    labelled = draw_grid(
        {"before": pictures, "after": pictures}, column_labels=["cat face Fluent", "x"], scale=4, title="T"
    )
    assert labelled.width > plain.width
    assert labelled.height > 2 * plain.height + 60
    assert stack([plain, labelled]).size == (labelled.width, plain.height + labelled.height)
    # The labels of large pictures are large enough to be read when the whole is made smaller.
    large = [Image.new("RGB", (1024, 1024))]
    words = ["a house at the sea, painted in the evening by one who is no longer known to the model"]
    tall = draw_grid({"": large}, column_labels=words).height - draw_grid({"": large}).height
    assert tall > 60


@pytest.mark.parametrize("label", ["a portrait by Blobmoji and others", "Donaudampfschifffahrtsgesellschaft"])
def test_a_label_stays_above_its_own_column(label):
    """Black ink only within the width of the column, whatever is in it, and the neighbor's is the same."""
    pictures = [Image.new("RGB", (128, 128), "red")] * 3
    sheet = draw_grid({"": pictures}, column_labels=["", label, ""])
    ink = (np.asarray(sheet.convert("L")) < 60).nonzero()[1]
    left = sheet.width - 2 * (128 + 4)
    assert left <= ink.min()
    assert ink.max() < left + 128
    assert ink.max() - ink.min() > 64  # and there is ink


def test_many_columns_go_on_below():
    red, green, blue = (Image.new("RGB", (32, 32), color) for color in COLOURS)
    rows = {"before": [red, green, blue], "after": [blue, red, green]}
    whole = draw_grid(rows, column_labels="abc", title="two blocks", most_columns=2)
    upper = draw_grid({name: row[:2] for name, row in rows.items()}, column_labels="ab", title="two blocks")
    lower = draw_grid({name: row[2:] for name, row in rows.items()}, column_labels="c")
    assert whole.tobytes() == stack([upper, lower]).tobytes()
    # a row without a picture in a block is not in it
    without = draw_grid(rows | {"target": [red, green, None]}, column_labels="abc", most_columns=2)
    first = {name: row[:2] for name, row in rows.items()} | {"target": [red, green]}
    assert without.tobytes() == stack([draw_grid(first, column_labels="ab"), lower]).tobytes()


def test_a_long_title_has_several_lines():
    pictures = [Image.new("RGB", (128, 128), "red")] * 4
    one, many = (draw_grid({"": pictures}, title=" and ".join(["Noto"] * n)) for n in (2, 20))
    assert one.width == many.width
    assert many.height > one.height + 20
