import pytest
import torch

import more_hf
from more_hf.bench.artists.images import generate, grid, lpips_distance, stack


PROMPTS = ["a cat", "a dog", "a house in the style of Monet"]


def draw(pipe, prompts=PROMPTS, seeds=(5, 6, 7), **options):
    return generate(pipe, prompts, seeds, **{"steps": 3, "guidance": 5.0, **options})


def test_a_row_depends_on_its_own_seed_only(tiny_sd):
    pipe = tiny_sd()
    together = draw(pipe)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 3, 32, 32)
    for batch_size in (1, 2):
        assert (together.int() - draw(pipe, batch_size=batch_size).int()).abs().max() <= 1
    alone = draw(pipe, PROMPTS[1:2], [6])
    assert (together[1].int() - alone[0].int()).abs().max() <= 1
    other = draw(pipe, PROMPTS[1:2], [7])
    assert (together[1].int() - other[0].int()).abs().max() > 10


@pytest.mark.slow
def test_a_routed_row_depends_on_its_own_seed_only(tiny_sd):
    pipe = tiny_sd()
    more_hf.erase_concept(pipe, "Van Gogh", remap_to=["Claude Monet", "Johannes Vermeer"], router="random")
    prompts = ["a cat in the style of Van Gogh"] * 4
    together = draw(pipe, prompts, range(4))
    alone = draw(pipe, prompts, range(4), batch_size=1)
    assert (together.int() - alone.int()).abs().max() <= 1


def test_generate_leaves_the_random_state_and_the_progress_bar(tiny_sd, capsys):
    pipe = tiny_sd()
    pipe.set_progress_bar_config(desc="mine", leave=False)
    state = torch.get_rng_state()
    draw(pipe, desc="before")
    assert torch.equal(state, torch.get_rng_state())
    assert pipe._progress_bar_config == {"desc": "mine", "leave": False}
    err = capsys.readouterr().err
    assert "before" in err
    assert "mine" not in err


def test_generate_is_silent_where_the_pipeline_is(tiny_sd, capsys):
    draw(tiny_sd())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("prompts", "seeds"), [([], []), (["a cat"], [1, 2])])
def test_generate_wants_a_seed_per_prompt(tiny_sd, prompts, seeds):
    with pytest.raises(ValueError, match="one seed per prompt"):
        draw(tiny_sd(), prompts, seeds)


def random_images(n, seed, side=64):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_lpips_is_zero_on_equal_and_positive_on_different_images():
    a, b = random_images(3, 0), random_images(3, 1)
    b[1] = a[1]
    distance = lpips_distance(a, b)
    assert distance.dtype == torch.float32
    assert distance.shape == (3,)
    assert distance[1] == 0
    assert (distance[[0, 2]] > 0.05).all()
    torch.testing.assert_close(lpips_distance(a, b, batch_size=2), distance)
    assert not torch.allclose(lpips_distance(a, b, size=128), distance, atol=1e-3)


def test_lpips_refuses_other_shapes_and_dtypes():
    a = random_images(2, 0)
    with pytest.raises(ValueError, match="differ in shape"):
        lpips_distance(a, a[:1])
    with pytest.raises(ValueError, match="uint8"):
        lpips_distance(a.float(), a)


def test_grid_puts_images_in_reading_order():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(3, 3, 8, 8)
    sheet = grid(images, columns=2, scale=4)
    cell = 32 + 4
    centres = [(4 + 16 + cell * (i % 2), 4 + 16 + cell * (i // 2)) for i in range(3)]
    assert [sheet.getpixel(centre) for centre in centres] == [tuple(colour) for colour in colours.tolist()]
    assert sheet.getpixel((4 + 16 + cell, 4 + 16 + cell)) == (255, 255, 255)  # the short row's empty place


def test_labels_make_room_for_themselves():
    images = random_images(4, 0, side=16)
    plain = grid(images, columns=2, scale=4)
    labelled = grid(
        images, columns=2, row_labels=["before", "after"], column_labels=["cat face Fluent", "x"], scale=4, title="T"
    )
    assert labelled.width > plain.width
    assert labelled.height > plain.height + 60
    assert stack([plain, labelled]).size == (labelled.width, plain.height + labelled.height)
