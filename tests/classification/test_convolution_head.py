"""A 1×1 convolution that makes the logits is edited as the linear layer with the same weight is."""

import copy

import pytest
import torch
from support.compare import same, state
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import more_hf
from more_hf.classification.features import features_of
from more_hf.classification.heads import find_heads
from more_hf.core.errors import SiteNotFoundError
from more_hf_bench.methods.classification.forget_samples import forget_samples


LABELS = torch.arange(60) % 5


class Own(nn.Module):
    """A backbone, and a head on the mean of its map, before or after that mean is taken."""

    def __init__(self, head, pooled_first):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU())
        self.head, self.pooled_first = head, pooled_first

    def forward(self, images):
        z = self.backbone(images)
        if isinstance(self.head, nn.Linear):
            return self.head(z.mean((2, 3)))
        return self.head(z.mean((2, 3), keepdim=True) if self.pooled_first else z).mean((2, 3))


@pytest.fixture
def images():
    return torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twins():
    """Two classifiers that are one function: a linear head, and a convolution with its weight."""

    def build(pooled_first):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            plain, convolution = nn.Linear(12, 5), nn.Conv2d(12, 5, 1)
            reference = Own(plain, True)
        with torch.no_grad():
            convolution.weight.copy_(plain.weight[..., None, None])
            convolution.bias.copy_(plain.bias)
        model = Own(convolution, pooled_first)
        model.backbone = copy.deepcopy(reference.backbone)
        return reference, model

    return build


@pytest.mark.parametrize("pooled_first", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"solver": "covariance"}, {"router": "hash", "remap_to": [1, 2]}], ids=str
)
def test_it_is_the_linear_layers_edit(twins, images, pooled_first, settings):
    reference, model = twins(pooled_first)
    before, original = state(model), model(images)
    for one in (reference, model):
        more_hf.erase_classes(one, [(images, LABELS)], [0], **settings)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)
    assert (model(images) - original).abs().max() > 0.01
    [(features, _)] = features_of(model, [(images, LABELS)])
    [(expected, _)] = features_of(reference, [(images, LABELS)])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)

    with more_hf.disabled(model):
        torch.testing.assert_close(model(images), original, rtol=1e-5, atol=1e-6)
    assert same(more_hf.restore(model), before)


def test_samples_too(twins, images):
    reference, model = twins(False)
    parts = [(images[:20], LABELS[:20])], [(images[20:], LABELS[20:])]
    before = model(images)
    for one in (reference, model):
        forget_samples(one, *parts)
    torch.testing.assert_close(model(images), reference(images), rtol=1e-4, atol=1e-5)
    assert (model(images) - before).abs().max() > 1e-4


def test_any_other_convolution_is_refused(images):
    wide = Own(nn.Conv2d(12, 5, 3), False)
    with pytest.raises(SiteNotFoundError, match="No head found"):
        find_heads(wide, images)
    for convolution in (nn.Conv2d(12, 5, 3), nn.Conv2d(10, 5, 1, groups=5)):
        with pytest.raises(SiteNotFoundError, match=r"`head` \(Conv2d\) is not a linear layer"):
            more_hf.erase_classes(Own(convolution, False), [(images, LABELS)], [0], head="head")


def test_saved_loaded_and_verified(tmp_path):
    small = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_chs": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TimmWrapperConfig(architecture="resnetv2_50", num_labels=5, model_args=small)
        model = TimmWrapperForImageClassification(config).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # its own weights give logits of 1e-7
        images = 0.3 * torch.randn(60, 3, 32, 32) + torch.randn(5, 3, 32, 32)[LABELS]
    original = model(images).logits
    more_hf.erase_classes(model, [(images, LABELS)], [0], router="hash", remap_to=[1, 2])
    assert isinstance(model.get_submodule(more_hf.get_erasure(model).request.head[0]), nn.Conv2d)
    more_hf.save(model, tmp_path / "erased", include_delta=True)

    assert more_hf.verify(tmp_path / "erased")
    loaded = more_hf.load(tmp_path / "erased").eval()
    torch.testing.assert_close(loaded(images).logits, model(images).logits, rtol=1e-4, atol=1e-5)
    assert (model(images).logits - original).abs().max() > 0.01
