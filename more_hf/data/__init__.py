"""Load the models that ship with the package: a small Stable Diffusion over ten emoji artists, and small
image classifiers. No network is needed."""

import contextlib
import warnings
from pathlib import Path


FOLDER = Path(__file__).parent

EMOJI_ARTISTS = (
    "Twemoji", "Noto", "Blobmoji", "Fluent", "Microsoft Flat", "High Contrast", "EmojiOne", "Monotone",
    "Firefox OS", "Streamline",
)  # fmt: skip
"""The artists that the embedded pipeline was trained on, in the spelling of its captions."""


CLASSIFIERS = (
    "digits-allcnn",
    "digits-vit",
    "emoji-100-resnet18",
    "fashion-mnist-allcnn",
    "fashion-mnist-resnet18",
    "fashion-mnist-vit",
)
"""The classifiers that ship with this package: data set and architecture. Their accuracies are in
`benchmarks/classifiers/README.md`."""


def load_emoji_sd(**kwargs):
    """
    Load the embedded Stable Diffusion pipeline: 64x64 emoji by ten artists, text as in
    `a cat face in the style of Blobmoji`.

    Args:
        **kwargs:
            Passed on to [`~diffusers.DiffusionPipeline.from_pretrained`]. Unlike there, `dtype` defaults to
            `torch.float32`, whatever the files hold.

    Returns:
        [`~diffusers.StableDiffusionPipeline`]: on the CPU, in evaluation mode, without a safety checker.

    Example:

    ```py
    >>> import more_hf

    >>> pipe = more_hf.load_emoji_sd()
    >>> image = pipe("a rocket in the style of Fluent", num_inference_steps=10, guidance_scale=4.0).images[0]
    ```
    """
    import torch
    from diffusers import StableDiffusionPipeline

    # diffusers renamed `torch_dtype` to `dtype` and still takes both.
    dtype = kwargs.pop("torch_dtype", torch.float32)
    options = {
        "dtype": dtype,
        "safety_checker": None,
        "requires_safety_checker": False,
        "local_files_only": True,
        **kwargs,
    }
    with _no_loading_bars():
        pipe = StableDiffusionPipeline.from_pretrained(FOLDER / "emoji_sd", **options)
    # What is saved from here names its base by this, not by a folder of the machine that it was made on.
    pipe.register_to_config(_name_or_path="emoji-sd")
    return pipe


def load_classifier(name: str):
    """
    Load a small trained image classifier that ships with this package.

    Args:
        name (`str`):
            One of `CLASSIFIERS`.

    Returns:
        [`~transformers.PreTrainedModel`]: float32 (the files hold half precision), on the CPU, in evaluation
        mode. It reads `pixel_values` in [-1, 1] as `more_hf_bench.classes.data.load_kd_data` gives them.

    Raises:
        ValueError: for a name that is none of `CLASSIFIERS`.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"There is no classifier {name!r}. There are {', '.join(CLASSIFIERS)}.")
    import torch
    from transformers import AutoModelForImageClassification

    from . import models  # noqa: F401  (registers AllCNN and the small-stem ResNet with transformers)

    with _no_loading_bars():
        options = {"dtype": torch.float32, "local_files_only": True}
        model = AutoModelForImageClassification.from_pretrained(FOLDER / "classifiers" / name, **options)
    return model.eval()


def load_lpips():
    """
    Build LPIPS(alex), version 0.1, without a download and without touching the random state: float32, on the
    CPU, in evaluation mode, no parameter requires a gradient. It takes two `(n, 3, H, W)` batches with values
    in `[-1, 1]` and returns `(n, 1, 1, 1)`.

    The `lpips` package has the linear layers; the convolutions of torchvision's AlexNet ship with `more_hf`.
    """
    import lpips
    import torch
    from safetensors.torch import load_file

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # torchvision renamed the argument that lpips passes to it.
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)

    # lpips cuts torchvision's `features` into `slice1` to `slice5` and keeps each layer's number.
    weights = load_file(FOLDER / "lpips" / "alexnet_features.safetensors")
    names = list(metric.net.state_dict())
    metric.net.load_state_dict({name: weights[f"features.{name.split('.', 1)[1]}"] for name in names})
    return metric.eval().requires_grad_(False)


@contextlib.contextmanager
def _no_loading_bars():
    """Silence the loading bars of both libraries, and leave their switches as they were."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
