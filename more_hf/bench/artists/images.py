"""Generate a set of prompts reproducibly, compare two sets with LPIPS, lay pictures out in a grid."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from accelerate.utils import tqdm
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

import more_hf
from more_hf.bench.methods.diffusion.progress import progress_bar_config
from more_hf.data import load_lpips


def generate(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    desc: str | None = None,
) -> torch.Tensor:
    """
    Generate one image per prompt. The noise of a row, and its experts where the erasure is routed, depend on the row's
    own seed only, not on the batch size, the other rows, or the device.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            A text-to-image pipeline. Not modified.
        prompts (`Sequence[str]`):
            One prompt per image.
        seeds (`Sequence[int]`):
            One seed per image.
        steps (`int`):
            Number of denoising steps.
        guidance (`float`):
            Scale of classifier-free guidance; 1 is none.
        batch_size (`int`, *optional*, defaults to 16):
            Images per call of the pipeline.
        desc (`str`, *optional*):
            Text before the progress bar. A pipeline whose own progress bar is disabled shows none here either.

    Returns:
        `torch.Tensor`: uint8 of shape `(n, 3, H, W)`, on the CPU.

    Raises:
        ValueError: if there are no prompts, or not as many seeds as prompts.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"Got {len(prompts)} prompts and {len(seeds)} seeds. Pass one seed per prompt, at least one.")
    erasure = more_hf.get_erasure(pipe)
    routed = erasure is not None and erasure.router is not None

    images = []
    with _no_inner_bar(pipe) as hidden:
        bar = tqdm(total=len(prompts), desc=desc, unit="image", disable=hidden)
        for start in range(0, len(prompts), batch_size):
            batch_seeds = list(seeds[start : start + batch_size])
            with more_hf.routing(pipe, seeds=batch_seeds) if routed else contextlib.nullcontext():
                batch = pipe(
                    prompt=list(prompts[start : start + batch_size]),
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch_seeds],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    output_type="pt",
                ).images
            images.append((batch.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8))
            bar.update(len(batch_seeds))
        bar.close()
    return torch.cat(images)


def lpips_distance(a: torch.Tensor, b: torch.Tensor, *, size: int | None = None, batch_size: int = 64) -> torch.Tensor:
    """
    Measure LPIPS(alex) between two sets of images, pair by pair.

    Args:
        a (`torch.Tensor`):
            uint8 of shape `(n, 3, H, W)`.
        b (`torch.Tensor`):
            uint8 of the same shape, on the same device.
        size (`int`, *optional*):
            Resize to `size` x `size` first (bilinear, antialiased). By default the images are compared as they are.
        batch_size (`int`, *optional*, defaults to 64):
            Pairs per forward pass.

    Returns:
        `torch.Tensor`: float32 of shape `(n,)`, on the CPU; 0 for equal images.

    Raises:
        ValueError: if the shapes differ or the images are not uint8.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"Images differ in shape: {tuple(a.shape)} and {tuple(b.shape)}. LPIPS compares pairs generated with the "
            "same settings."
        )
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(f"LPIPS pairs are uint8 images in [0, 255]; got {a.dtype} and {b.dtype}.")
    metric = _lpips(a.device)
    distances = []
    with torch.no_grad():
        for pair in zip(a.split(batch_size), b.split(batch_size), strict=True):
            x, y = (image.float() / 127.5 - 1 for image in pair)
            if size is not None:
                x, y = (interpolate(image, (size, size), mode="bilinear", antialias=True) for image in (x, y))
            distances.append(metric(x, y).flatten().cpu())
    return torch.cat(distances) if distances else torch.empty(0)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Turn one uint8 image of shape `(3, H, W)` into a `PIL.Image`."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def grid(
    images: torch.Tensor,
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int = 1,
    title: str = "",
) -> Image.Image:
    """
    Lay images out row by row on white, with labels.

    Args:
        images (`torch.Tensor`):
            uint8 of shape `(n, 3, H, W)`; the last row may be short.
        columns (`int`):
            Images per row.
        row_labels (`Sequence[str]`, *optional*):
            One label per row, to its left.
        column_labels (`Sequence[str]`, *optional*):
            One label per column, above it; broken into lines where it is wider than its column.
        scale (`int`, *optional*, defaults to 1):
            Enlarge each image this many times.
        title (`str`, *optional*):
            A line above everything.
    """
    font, bold = ImageFont.load_default(size=15), ImageFont.load_default(size=20)
    height, width = (side * scale for side in images.shape[-2:])
    gap, line = 4, 19
    labels = [_wrap(label, font, width) for label in column_labels[:columns]]
    left = gap + max((int(font.getlength(label)) + 2 * gap for label in row_labels), default=0)
    top = gap + (34 if title else 0) + line * max((len(lines) for lines in labels), default=0) + (gap if labels else 0)
    rows = -(-len(images) // columns)
    right = left + columns * (width + gap)
    if title:
        right = max(right, int(bold.getlength(title)) + 2 * gap)

    sheet = Image.new("RGB", (right, top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), title, fill="black", font=bold)
    for column, lines in enumerate(labels):
        centre = left + column * (width + gap) + width // 2
        for i, text in enumerate(reversed(lines)):
            draw.text((centre, top - 2 * gap - i * line), text, fill="black", font=font, anchor="ms")
    for row, label in enumerate(row_labels[:rows]):
        draw.text((left - 2 * gap, top + row * (height + gap) + height // 2), label, "black", font, anchor="rm")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        picture = to_pil(image).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(picture, (left + column * (width + gap), top + row * (height + gap)))
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Put pictures below each other on white, aligned on the left."""
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    y = 0
    for sheet in sheets:
        whole.paste(sheet, (0, y))
        y += sheet.height
    return whole


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels where its words allow."""
    lines = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@functools.lru_cache(maxsize=1)
def _lpips(device: torch.device):
    return load_lpips().to(device)


@contextlib.contextmanager
def _no_inner_bar(pipe):
    """Disable the pipeline's bar over steps; yield whether its user had disabled it, and put the setting back."""
    config = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**{**config, "disable": True})
    try:
        yield config.get("disable", False)
    finally:
        pipe.set_progress_bar_config(**config)
