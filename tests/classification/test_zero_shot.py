"""Models of images and texts, whose class prompts are the rows of a head."""

import re
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from PIL import Image
from support.compare import same, state
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
)

import more_hf


EXAMPLES = Path(__file__).parents[2] / "examples" / "README.md"
NAMES = ["tench, Tinca tinca", "goldfish", "hen"]
PROMPTS = ["a photo of a tench", "a photo of a goldfish", "a photo of a hen"]
WORDS = {word: i for i, word in enumerate("[PAD] [EOS] [UNK] a photo of tench goldfish hen drawing".split())}
LABELS = torch.arange(3).repeat(6)
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def tokenizer():
    backend = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", eos_token="[EOS]")


def images():
    return torch.randn(len(LABELS), 3, 8, 8, generator=torch.Generator().manual_seed(0))


def of_transformers(cls, config):
    text = {**TINY, "vocab_size": len(WORDS), "max_position_embeddings": 64, "eos_token_id": 1}
    vision = {**TINY, "image_size": 8, "patch_size": 4}
    sizes = {"projection_dim": 12} if cls is CLIPModel else {"text_config": {**text, "projection_size": 16}}
    model = cls(config(**{"text_config": text, **sizes}, vision_config=vision))
    own = tokenizer()
    length = {"padding": "max_length", "max_length": 64} if cls is SiglipModel else {"padding": True}

    def reference(prompts):
        tokens = own(prompts, return_tensors="pt", **length)
        with torch.no_grad():
            found = model.eval()(
                tokens.input_ids, pixel_values=images(), attention_mask=tokens.attention_mask
            )
        return found.logits_per_image

    return model, own, reference


def of_open_clip():
    vision = {"layers": 1, "width": 64, "patch_size": 4, "image_size": 8, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(12, vision, text)
    own = open_clip.SimpleTokenizer(context_length=16)

    def reference(prompts):
        with torch.no_grad():
            return model.eval().get_logits(images(), own(prompts))[0]

    return model, own, reference


MODELS = {
    "clip": lambda: of_transformers(CLIPModel, CLIPConfig),
    "siglip": lambda: of_transformers(SiglipModel, SiglipConfig),
    "open_clip": of_open_clip,
}


@pytest.fixture
def built(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[request.param]()


@pytest.mark.parametrize("built", MODELS, indirect=True)
def test_the_prompts_are_a_head_and_a_class_is_forgotten_in_it(built):
    model, own, reference = built
    before = state(model)
    classifier = more_hf.zero_shot_classifier(model, own, NAMES, template="a photo of a {}")
    with torch.no_grad():
        logits = classifier(images())
    torch.testing.assert_close(logits, reference(PROMPTS), rtol=1e-4, atol=1e-4)

    more_hf.erase_classes(classifier, [(images(), LABELS)], ["tench"], remap_to=["hen"], most_lost=100)
    with torch.no_grad():
        edited = classifier(images())
    means = [torch.stack([each[LABELS == i].mean(0) for i in range(3)]) for each in (logits, edited)]
    torch.testing.assert_close(means[1], means[0][[2, 1, 2]], rtol=1e-3, atol=1e-3)
    assert (means[1] - means[0]).abs().max() > 0.01
    assert same(model, before)  # the model itself knows the class


@pytest.mark.parametrize("built", ["clip"], indirect=True)
def test_folded_into_the_projection_no_prompt_finds_the_class(built, tmp_path):
    model, own, reference = built
    classifier = more_hf.zero_shot_classifier(model, own, NAMES, template="a photo of a {}")
    more_hf.erase_classes(classifier, [(images(), LABELS)], ["tench"], remap_to=["hen"], most_lost=100)
    remap = more_hf.get_erasure(classifier).remap
    others = ["a drawing of a tench", "a drawing of a hen", "a goldfish"]
    rows = more_hf.zero_shot_classifier(model, own, others, template="{}").classifier.weight
    with torch.no_grad():
        z = torch.nn.functional.normalize(model.get_image_features(images()).pooler_output, dim=-1)
        moved = remap.apply(z.double()).float()
        expected = torch.nn.functional.normalize(moved, dim=-1) @ rows.T
        original = reference(others)
        weight = model.visual_projection.weight
        weight.copy_(remap.apply(weight.T.double()).T)
    model.save_pretrained(tmp_path)
    model.load_state_dict(CLIPModel.from_pretrained(tmp_path).state_dict())
    torch.testing.assert_close(reference(others), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(original, expected, rtol=1e-2)


@pytest.mark.parametrize("built", ["clip"], indirect=True)
def test_the_recipe_of_the_examples(built, tmp_path, monkeypatch):
    model, own, _ = built
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("openai/clip-vit-base-patch32")
    scaled = ViTImageProcessor(do_resize=False)
    processor = SimpleNamespace(tokenizer=own, image_processor=scaled)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: processor)
    for i, name in enumerate(("tench", "goldfish", "hen")):
        (tmp_path / "my-images" / name).mkdir(parents=True)
        color = tuple(255 * (channel == i) for channel in range(3))
        for j in range(4):
            Image.new("RGB", (8, 8), tuple(max(0, c - 9 * j) for c in color)).save(
                f"my-images/{name}/{j}.png"
            )
    (block,) = re.findall(r"```python\n([^`]*CLIPModel.*?)```", EXAMPLES.read_text("utf-8"), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    saved, original = CLIPModel.from_pretrained("clip-without-tench").state_dict(), model.state_dict()
    changed = [name for name, value in original.items() if not torch.equal(saved[name], value)]
    assert changed == ["visual_projection.weight"]


@pytest.mark.parametrize("built", ["clip"], indirect=True)
def test_several_templates_are_averaged_and_what_is_no_such_model_is_refused(built):
    model, own, _ = built
    heads = [
        more_hf.zero_shot_classifier(model, own, NAMES, template=template).classifier.weight
        for template in ("a photo of a {}", "a drawing of a {}", ["a photo of a {}", "a drawing of a {}"])
    ]
    normal = torch.nn.functional.normalize(heads[0] + heads[1], dim=-1)
    torch.testing.assert_close(heads[2], normal * model.logit_scale.exp())
    with pytest.raises(more_hf.SiteNotFoundError, match="scaled cosine"):
        more_hf.zero_shot_classifier(torch.nn.Linear(2, 2), own, NAMES)
    with pytest.raises(more_hf.SiteNotFoundError, match="more_hf.zero_shot_classifier"):
        more_hf.erase_classes(model, [(images(), LABELS)], [0])
