from PIL import Image

from more_hf.diffusion.grid import draw_grid
from more_hf_bench.artists.grid import stack


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
