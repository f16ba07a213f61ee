"""Classifiers whose classes are prompts (CLIP, SigLIP): the rows of a head are the prompts' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedConfig

from ..core.errors import SiteNotFoundError
from .heads import evaluating


class ZeroShotForImageClassification(nn.Module):
    """
    The image side of a model of images and texts, and a linear head on its normalized embeddings.

    `model` is that model, `classifier` the head; a call takes `pixel_values` and returns the logits.
    """

    def __init__(self, model: nn.Module, classifier: nn.Linear, names: Sequence[str]):
        super().__init__()
        self.model, self.classifier = model, classifier
        self.config = PreTrainedConfig(id2label=dict(enumerate(names)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        encode = getattr(self.model, "encode_image", None) or self.model.get_image_features
        return self.classifier(_unit(encode(pixel_values)))


def zero_shot_classifier(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    names: Sequence[str],
    *,
    template: str | Sequence[str] = "a photo of a {}.",
) -> ZeroShotForImageClassification:
    """
    Make a classifier of a model of images and texts, from which `erase_classes` can erase. The model itself
    is not changed, then or now.

    A class is forgotten in the rows of the head, which are its prompts' embeddings: every such model has
    them, and nothing else that uses the model changes. **The model still knows the class**, and whoever
    writes the prompt again has it. Of CLIP the edit can go on into the linear projection of its images, so
    that no prompt finds the class (`examples/README.md`); SigLIP and others have no such layer.

    Args:
        model (`nn.Module`):
            A model of Transformers with `get_image_features`, `get_text_features` and `logit_scale`
            (`CLIPModel`, `SiglipModel`, `AltCLIPModel`, ...), or one of open_clip.
        tokenizer (`Callable`):
            Its tokenizer, or a processor that has one.
        names (`Sequence[str]`):
            The classes. Of "tench, Tinca tinca" the first synonym goes into the prompt.
        template (`str` or `Sequence[str]`, *optional*, defaults to `"a photo of a {}."`):
            The prompt; of several the embeddings are averaged.

    Returns:
        `ZeroShotForImageClassification`: its logits are the model's own `logits_per_image` for these prompts.

    Raises:
        `SiteNotFoundError`: the model does not compare images with texts by a scaled cosine.

    Example:

        >>> import more_hf
        >>> from transformers import AutoProcessor, CLIPModel
        >>> clip = CLIPModel.from_pretrained("openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> processor = AutoProcessor.from_pretrained("openai/clip-vit-base-patch32")  # doctest: +SKIP
        >>> model = more_hf.zero_shot_classifier(clip, processor, ["tench", "goldfish"])  # doctest: +SKIP
        >>> more_hf.erase_classes(model, loader, forget=["tench"])  # doctest: +SKIP
    """
    has_texts = hasattr(model, "get_text_features") or hasattr(model, "encode_text")
    if not (has_texts and hasattr(model, "logit_scale")):
        raise SiteNotFoundError(
            f"A {type(model).__name__} does not compare images with texts by a scaled cosine. Pass a model "
            "like CLIPModel or SiglipModel, or one of open_clip."
        )
    templates = [template] if isinstance(template, str) else list(template)
    first = [name.partition(",")[0] for name in names]
    with evaluating(model):
        each = [_unit(_encoded(model, tokenizer, [one.format(name) for name in first])) for one in templates]
        rows = normalize(torch.stack(each).mean(0), dim=-1) * model.logit_scale.exp()
        bias = getattr(model, "logit_bias", None)
        head = nn.Linear(rows.shape[1], len(rows), bias=bias is not None).to(rows)
        head.weight.copy_(rows)
        if bias is not None:
            head.bias.copy_(bias.expand(len(rows)))
    return ZeroShotForImageClassification(model, head, names).eval()


def _encoded(model: nn.Module, tokenizer: Callable[..., Any], prompts: list[str]) -> Any:
    """The embeddings of prompts."""
    device = model.logit_scale.device
    if hasattr(model, "encode_text"):  # of open_clip
        return model.encode_text(tokenizer(prompts).to(device))
    # SigLIP was trained on texts of one length
    padding = {"padding": "max_length", "max_length": 64} if "siglip" in model.config.model_type else {}
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = tokenizer(prompts, **{"padding": True, "truncation": True, "return_tensors": "pt", **padding})
    named = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask") if name in tokens}
    return model.get_text_features(**named)


def _unit(output: Any) -> Tensor:
    """Embeddings of length 1, from open_clip or Transformers."""
    return normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=-1)
