"""The judges, and LPIPS beside them."""

import warnings

import pytest
import torch
from support.judges import build_tiny_clip

from more_hf.data import EMOJI_ARTISTS
from more_hf.tuning.judge import lpips_distance, pooled_features
from more_hf_bench.artists.generate import generate
from more_hf_bench.artists.judges import (
    ClipJudges,
    EmojiJudges,
    JudgeError,
    all_distances,
    resize_64,
    without_artist,
)
from more_hf_bench.artists.prompts import PromptRow, read_prompts


@pytest.fixture(scope="module")
def judges():
    return EmojiJudges()


def test_what_ships_says_what_it_is_worth(judges):
    assert judges.artists == list(EMOJI_ARTISTS)
    judges.check(read_prompts("emoji10").rows)
    judges.check(read_prompts("emoji10_validation").rows)
    for column, least in (("artist_accuracy", 40), ("thing_accuracy", 75)):
        assert list(judges.facts[column]) == judges.artists
        assert min(judges.facts[column].values()) >= least
    for artist, taken_for in judges.facts["confusion"].items():
        assert sum(taken_for.values()) == pytest.approx(100, abs=0.6)
        assert taken_for[artist] == judges.facts["artist_accuracy"][artist]


@pytest.mark.slow
def test_they_beat_chance_on_the_pipelines_pictures(emoji_sd, judges):
    rows = [row for row in read_prompts("emoji10").rows if row.artist and row.case_number % 20 in (1, 6, 13)]
    prompts, seeds = [row.prompt for row in rows], [row.evaluation_seed for row in rows]
    images = generate(emoji_sd, prompts, seeds, steps=8, guidance=5.0)
    style, content = judges.judge(images, rows)
    right = sum(artist == row.artist for artist, row in zip(style, rows, strict=True))
    assert right / len(rows) > 0.25  # chance is 0.1
    assert sum(content) / len(rows) > 0.3  # chance is below 0.01
    # noise shows no thing
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert sum(judges.judge(noise, rows)[1]) <= 2
    # each picture is judged for itself
    assert judges.judge(images[3:5], rows[3:5]) == (style[3:5], content[3:5])


def test_without_a_thing_nothing_is_asked(judges):
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    rows = [PromptRow(0, "Noto", 1, "Noto"), PromptRow(1, "a crab", 1, "", "crab")]
    assert judges.judge(images, rows)[1][0] is None
    with pytest.raises(JudgeError, match="Case 2 has the thing 'crabs'"):
        judges.check([*rows, PromptRow(2, "crabs", 1, "Noto", "crabs")])
    with pytest.raises(JudgeError, match="the artist 'Van Gogh'"):
        judges.check([PromptRow(2, "a crab by Van Gogh", 1, "Van Gogh", "crab")])


def test_the_features_by_hand(judges):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = pooled_features(judges.lpips, images, batch_size=1)
    large = torch.nn.functional.interpolate(images, size=(128, 128), mode="bilinear")
    first = judges.lpips.net.slice1(judges.lpips.scaling_layer(large))
    assert z.shape == (2, 3 * (64 + 192 + 384 + 256 + 256))
    torch.testing.assert_close(z[:, :64], first.flatten(2).mean(2))
    torch.testing.assert_close(z[:, 64:128], first.flatten(2).std(2))
    torch.testing.assert_close(z[:, 128:192], first.flatten(2).max(2).values)


@pytest.fixture(scope="module")
def tiny_clip():
    return build_tiny_clip()


CLIP_ROWS = [
    PromptRow(0, "a cat in the style of Van Gogh", 1, "Van Gogh"),
    PromptRow(1, "Van Gogh's dog", 2, "Van Gogh"),
    PromptRow(2, "a cat by Picasso", 3, "Pablo Picasso"),
    PromptRow(3, "a cat by Pablo Picasso", 4, "Pablo Picasso"),
    PromptRow(4, "a tree", 5, ""),
    PromptRow(5, "a house", 6, ""),
]


def test_clip_judges_against_a_plain_loop(tiny_clip):
    model, tokenizer = tiny_clip
    judges = ClipJudges(model, tokenizer, CLIP_ROWS)
    judges.check(CLIP_ROWS)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 64, 48), dtype=torch.uint8, generator=generator)
    style, content = judges.judge(images, CLIP_ROWS)

    def similarity(image, text):
        resized = torch.nn.functional.interpolate(image[None] / 255, (32, 32), mode="bicubic", antialias=True)
        small = resized.clamp(0, 1)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        with torch.no_grad():
            a, b = model.encode_image((small - mean) / deviation), model.encode_text(tokenizer([text]))
        return float(torch.nn.functional.cosine_similarity(a, b))

    artists = ["Van Gogh", "Pablo Picasso"]
    assert style == [
        max(artists, key=lambda a: similarity(image, f"a picture in the style of {a}")) for image in images
    ]
    sentences = {
        "Van Gogh": ["a cat in the style of the artist", "the artist's dog"],
        "Pablo Picasso": ["a cat by the artist"],
        "": ["a tree", "a house"],
    }
    own = [*sentences["Van Gogh"], *sentences["Pablo Picasso"] * 2, *sentences[""]]
    best = [
        max(sentences[row.artist], key=lambda text: similarity(image, text))
        for image, row in zip(images, CLIP_ROWS, strict=True)
    ]
    assert content == [int(a == b) for a, b in zip(best, own, strict=True)]
    found = [similarity(image, text) for image, text in zip(images, own, strict=True)]
    assert judges.scores(images, CLIP_ROWS) == pytest.approx([100 * cosine for cosine in found], abs=1e-3)
    assert content[2] == content[3] == 1  # the same sentence twice counts as one
    with pytest.raises(JudgeError, match="No CLIP judge nothing openai"):
        ClipJudges.load(CLIP_ROWS, model="nothing", pretrained="openai")
    with pytest.raises(JudgeError, match="Case 6"):
        judges.check([PromptRow(6, "a boat by Picasso", 1, "Pablo Picasso")])


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-L-14-quickgelu"])
def test_openais_weights_get_the_network_that_they_were_trained_in(name, monkeypatch):
    """At a tiny size and without weights; open_clip warns where the two differ, and builds GELU."""
    import open_clip
    from open_clip import factory

    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    config["text_cfg"] |= {"layers": 1, "width": 48}
    monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    monkeypatch.setattr(factory, "download_pretrained", lambda *args, **kwargs: "weights")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *args, **kwargs: None)

    def activations(model):
        return {type(module) for module in model.modules() if "GELU" in type(module).__name__}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judges = ClipJudges.load(CLIP_ROWS, model=name, pretrained="openai")
    assert activations(judges.model) == {open_clip.model.QuickGELU}
    if name == "ViT-L-14":
        with pytest.warns(UserWarning, match="QuickGELU mismatch"):
            assert activations(open_clip.create_model(name, pretrained="openai")) == {torch.nn.GELU}


@pytest.mark.parametrize(
    ("prompt", "artist", "left"),
    [
        ("A field in Van Gogh's style", "Van Gogh", "A field in the artist's style"),
        ("a bull, picasso 1911", "Pablo Picasso", "a bull, the artist 1911"),
        ("a bull by Pablo Picasso", "Pablo Picasso", "a bull by the artist"),
        ("Ajin: Demi Human, a train", "Ajin: Demi Human", "the artist, a train"),
        ("the ghosts of Ajin", "Ajin: Demi Human", "the ghosts of the artist"),
        ("an English engine by Kilian Eng", "Kilian Eng", "an English engine by the artist"),
        ("a tree", "", "a tree"),
    ],
)
def test_the_prompt_without_the_artist(prompt, artist, left):
    assert without_artist(prompt, artist) == left


def random_images(n, seed, side=64):
    return torch.randint(
        0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_lpips_is_zero_on_equal_and_positive_on_different_images():
    a, b = random_images(3, 0), random_images(3, 1)
    b[1] = a[1]
    distance = lpips_distance(a, b)
    assert distance.dtype == torch.float32
    assert distance.shape == (3,)
    assert distance[1] == 0
    assert (distance[[0, 2]] > 0.05).all()
    torch.testing.assert_close(lpips_distance(a, b, batch_size=2), distance)


def test_lpips_refuses_other_shapes_and_dtypes():
    a = random_images(2, 0)
    with pytest.raises(ValueError, match="differ in shape"):
        lpips_distance(a, a[:1])
    with pytest.raises(ValueError, match="uint8"):
        lpips_distance(a.float(), a)


def test_distances_at_native_size_and_resized():
    a, b, cpu = random_images(2, 0, side=96), random_images(2, 1, side=96), torch.device("cpu")
    distances = all_distances(a, b, cpu)
    torch.testing.assert_close(distances["lpips"], lpips_distance(a, b))
    for name, antialias in (("lpips_64", True), ("lpips_64_rece", False)):
        small = [resize_64(images, antialias=antialias) for images in (a, b)]
        torch.testing.assert_close(distances[name], lpips_distance(*small))
    small = all_distances(a[..., :64, :64], b[..., :64, :64], cpu)
    assert torch.equal(small["lpips"], small["lpips_64"])
    assert all(not distance.any() for distance in all_distances(a, a, cpu).values())


def test_resizes_of_512_pixels():
    from torch.nn.functional import interpolate

    image = torch.randint(
        0, 256, (1, 3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rece, uce = resize_64(image, antialias=False), resize_64(image, antialias=True)
    for small, antialias in ((rece, False), (uce, True)):
        wanted = interpolate(image.float(), size=(64, 64), mode="bilinear", antialias=antialias)
        assert (small.float() - wanted).abs().max() <= 0.5
    # by hand: without antialias a pixel is the mean of the four in the middle of its 8 x 8 square, with it of
    # many more
    middle = image[0, :, 3:5, 3:5].float().mean((1, 2))
    assert (rece[0, :, 0, 0].float() - middle).abs().max() <= 0.5
    assert uce.float().std() < rece.float().std() / 2
