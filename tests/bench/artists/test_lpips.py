import pytest
import torch

from more_hf.tuning.judge import lpips_distance
from more_hf_bench.artists.judges import all_distances, resize_64


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
