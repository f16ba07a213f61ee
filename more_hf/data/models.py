"""Two small image classifiers that transformers does not have: AllCNN, and a ResNet with a 3×3 stem.

Importing this module registers them with transformers' auto classes, so that saving, loading, `id2label`,
`more_hf.save` and `pipeline` treat them like any other model.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class AllCNNConfig(PreTrainedConfig):
    """Configuration of AllCNN. The `width` is that of a feature, and of the last seven convolutions; the
    first two have half as many channels.
    """

    model_type = "allcnn"
    num_channels: int = 3
    width: int = 96


class AllCNNForImageClassification(PreTrainedModel):
    """The all-convolutional network (Springenberg et al. 2015) in the layout of the unlearning literature.

    Seven 3×3 convolutions, the third and the sixth with stride 2, and one 1×1, each with batch normalization
    and ReLU; then the mean over positions, which is the feature, and one linear layer.
    """

    config_class = AllCNNConfig
    base_model_prefix = "features"
    main_input_name = "pixel_values"

    def __init__(self, config: AllCNNConfig):
        super().__init__(config)
        half, full = config.width // 2, config.width
        widths = [config.num_channels, half, half, full, full, full, full, full]
        strides = [1, 1, 2, 1, 1, 2, 1]
        blocks = [
            _block(inputs, outputs, 3, stride)
            for (inputs, outputs), stride in zip(pairwise(widths), strides, strict=True)
        ]
        self.features = nn.Sequential(
            *blocks, _block(full, full, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.classifier = nn.Linear(full, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images `(batch, num_channels, H, W)`: `logits` `(batch, num_labels)`, and `loss` if labels
        are given.
        """
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def _block(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class SmallStemResNetConfig(ResNetConfig):
    """A `ResNetConfig` with a `stem_stride`: 1 is the usual stem for CIFAR, 2 halves the image once."""

    model_type = "small_stem_resnet"
    stem_stride: int = 1


class SmallStemResNetForImageClassification(ResNetForImageClassification):
    """A ResNet with a 3×3 first convolution and no pooling after it, for images of 28 to 64 pixels."""

    config_class = SmallStemResNetConfig

    def __init__(self, config: SmallStemResNetConfig):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, 3, config.stem_stride, padding=1, bias=False
        )
        stem.pooler = nn.Identity()
        self.post_init()


AutoConfig.register("allcnn", AllCNNConfig)
AutoModelForImageClassification.register(AllCNNConfig, AllCNNForImageClassification)
AutoConfig.register("small_stem_resnet", SmallStemResNetConfig)
AutoModelForImageClassification.register(SmallStemResNetConfig, SmallStemResNetForImageClassification)
