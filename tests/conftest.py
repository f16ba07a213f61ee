import copy
import os
import shutil
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # before the first Hugging Face import reads it

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import more_hf
from more_hf.data import load_emoji_sd


# More threads than this cost more than they give at the sizes of these tests.
torch.set_num_threads(min(4, torch.get_num_threads()))

WORDS = (
    "a in of style the by painting drawing photo picture art cat dog house tree car person van gogh vincent claude "
    "monet johannes vermeer kelly clarkson mckernan picasso pablo andy warhol"
)
TEXT_WIDTH = 32
TEXT_LENGTH = 48


def tiny_tokenizer():
    """Build a CLIP tokenizer in memory: every byte, and the words above as far as their merges agree."""
    from transformers import CLIPTokenizer

    # CLIP writes bytes as printable characters; the printable ones stand for themselves.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [f"{character}</w>" for character in characters]
    merges = []
    for word in WORDS.split():
        left, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for right in rest:
            merges.append((left, right))
            left += right
            tokens.append(left)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), model_max_length=TEXT_LENGTH)


def build_tiny_sd(version: str = "1", seed: int = 0, **unet_options):
    """
    Build a StableDiffusionPipeline in the layout of SD `version` "1" or "2": random weights, 32x32 images, text width
    32. Does not change the global random state.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    layout = {
        "1": {"attention_head_dim": 2},
        "2": {"attention_head_dim": [1, 2], "use_linear_projection": True},
    }[version]
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=TEXT_LENGTH,
                hidden_act="quick_gelu" if version == "1" else "gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            **{
                "sample_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "block_out_channels": (4, 8),
                "layers_per_block": 1,
                "norm_num_groups": 2,
                "cross_attention_dim": TEXT_WIDTH,
                **layout,
                **unet_options,
            }
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(4, 8),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=32,
        )
    if version == "1":
        scheduler = PNDMScheduler(skip_prk_steps=True, **noise)
    else:
        scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, **noise)
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def one_thread():
    """A module's tests on one thread; all others share the number set above."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emoji_sd():
    """The embedded pipeline, loaded once. Do not modify it: `copy_of_emoji_sd` is for that."""
    pipe = load_emoji_sd()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def copy_of_emoji_sd(emoji_sd):
    """A factory of independent copies of the embedded pipeline."""
    return lambda: copy.deepcopy(emoji_sd)


@pytest.fixture
def tiny_sd():
    """A factory: `tiny_sd(version="1" or "2", seed=0, **unet_options)`."""
    return build_tiny_sd


@pytest.fixture
def hub(tmp_path):
    from memory_hub import Hub

    return Hub(tmp_path)


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory):
    """A folder that `save` wrote, with the factors, and the state of the original denoiser. Not to be modified."""
    from memory_hub import erase

    pipe = build_tiny_sd()
    original = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    return more_hf.save(erase(pipe, router="random"), tmp_path_factory.mktemp("saved") / "erased", include_delta=True), original


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of the folder that a test may change."""
    return Path(shutil.copytree(saved_once[0], tmp_path / "erased"))


@pytest.fixture(scope="module")
def short_prompts():
    """See `tiny_pipelines.shorten`."""
    from tiny_pipelines import shorten

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def families():
    """The newer families, by name. Not to be modified."""
    from tiny_pipelines import FAMILIES, build

    return {family: build(family) for family in FAMILIES}


@pytest.fixture(scope="module")
def erased_families(families, short_prompts):
    """The same, erased. Not to be modified."""
    from tiny_pipelines import erase

    return {family: erase(copy.deepcopy(pipe)) for family, pipe in families.items()}


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits: images `(1797, 1, 8, 8)` in [0, 1], labels `(1797,)`. Train on the first 1200."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture(scope="session")
def digit_classifier(digits):
    """A small ResNet of Transformers (features of 32), trained here on digits to 94 % on the last 597. Copy it before changing it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    images, labels = digits
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(DIGITS))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNetForImageClassification(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(6):
            for rows in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                model(images[rows], labels=labels[rows]).loss.backward()
                optimizer.step()
    return model.eval()


@pytest.fixture
def model(digit_classifier):
    """A copy of it that a test may change."""
    return copy.deepcopy(digit_classifier)


@pytest.fixture
def loader(digits):
    images, labels = digits
    return DataLoader(TensorDataset(images[:1200], labels[:1200]), batch_size=100)


@pytest.fixture(scope="session")
def prototypes(digit_classifier, digits):
    images, labels = digits
    return more_hf.collect_prototypes(digit_classifier, [(images[:1200], labels[:1200])])


def accuracies(model, digits):
    """Percent of every class in the held-out digits."""
    images, labels = digits[0][1200:], digits[1][1200:]
    with torch.no_grad():
        predicted = model.eval()(images).logits.argmax(1)
    return torch.stack([100 * (predicted[labels == i] == i).float().mean() for i in range(10)])


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    return model.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
