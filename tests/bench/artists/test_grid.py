import torch

from more_hf.bench.artists.grid import grid, stack


def test_grid_puts_images_in_reading_order():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(3, 3, 8, 8)
    sheet = grid(images, columns=2, scale=4)
    cell = 32 + 4
    centres = [(4 + 16 + cell * (i % 2), 4 + 16 + cell * (i // 2)) for i in range(3)]
    assert [sheet.getpixel(centre) for centre in centres] == [tuple(colour) for colour in colours.tolist()]
    assert sheet.getpixel((4 + 16 + cell, 4 + 16 + cell)) == (255, 255, 255)  # the short row's empty place


def test_labels_make_room_for_themselves():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    plain = grid(images, columns=2, scale=4)
    labelled = grid(
        images,
        columns=2,
        row_labels=["before", "after"],
        column_labels=["cat face Fluent", "x"],
        scale=4,
        title="T",
    )
    assert labelled.width > plain.width
    assert labelled.height > plain.height + 60
    assert stack([plain, labelled]).size == (labelled.width, plain.height + labelled.height)
