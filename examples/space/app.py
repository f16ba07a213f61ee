"""A Space that erases an emoji artist while you watch: pick one and a target, compare, take the LoRA home."""

import functools
import tempfile
from pathlib import Path

import gradio as gr
import torch
from diffusers.utils import make_image_grid
from PIL import Image

import more_hf
from more_hf.data import EMOJI_ARTISTS


THINGS = ["cat face", "rocket", "pizza"]
CONCEPT, TARGETS = "High Contrast", ("Fluent",)  # what the page opens with


def example(concept):
    """Prompts to look at: three in the artist's style, and one that must stay as it is."""
    prompts = [f"a {thing} in the style of {concept}" for thing in THINGS]
    return "\n".join([*prompts, "a house in the style of Noto"])


def draw(pipe, prompts, seed):
    """One picture per prompt, three times their size, two in a row."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    images = pipe(prompts, generator=generators, num_inference_steps=10, guidance_scale=4.0).images
    images = [image.resize((192, 192), Image.Resampling.LANCZOS) for image in images]
    if len(images) % 2:
        images.append(Image.new("RGB", images[0].size, "white"))
    return make_image_grid(images, rows=len(images) // 2, cols=2)


@functools.lru_cache(maxsize=16)  # the page's first example is drawn once for all visitors
def erased(concept, targets, prompts, seed):
    """Before, after, what was measured, and the LoRA file."""
    pipe = more_hf.load_emoji_sd()  # a second's work, and no visitor sees another's erasure
    more_hf.erase_concept(pipe, concept, remap_to=targets or None)
    with more_hf.disabled(pipe):
        before = draw(pipe, list(prompts), seed)
    after = draw(pipe, list(prompts), seed)
    name = f"without_{concept.lower().replace(' ', '_')}.safetensors"
    lora = more_hf.save_lora(pipe, Path(tempfile.mkdtemp()) / name)
    return before, after, more_hf.get_erasure(pipe).to_markdown(), str(lora)


def erase(concept, targets, text, seed):
    """What the button does."""
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not 1 <= len(prompts) <= 8:
        raise gr.Error("Write one to eight prompts, one a line.")
    try:
        return erased(concept, tuple(targets), prompts, int(seed))
    except more_hf.MoreError as error:
        raise gr.Error(str(error)) from error


with gr.Blocks(title="more_hf", delete_cache=(3600, 3600)) as demo:
    gr.Markdown(
        "# Make a pipeline forget\n"
        "One call, in closed form, on a small Stable Diffusion over ten emoji artists."
    )
    with gr.Row():
        concept = gr.Dropdown(EMOJI_ARTISTS, value=CONCEPT, label="Forget")
        targets = gr.Dropdown(
            EMOJI_ARTISTS,
            value=list(TARGETS),
            multiselect=True,
            label="and draw instead (nothing: project it out)",
        )
        seed = gr.Number(0, precision=0, label="Seed")
    prompts = gr.Textbox(example(CONCEPT), lines=4, label="Prompts, one a line")
    button = gr.Button("Erase", variant="primary")
    with gr.Row():
        before = gr.Image(label="Before", format="png")
        after = gr.Image(label="After, from the same noise", format="png")
    lora = gr.File(label="The erasure as a LoRA for diffusers")
    with gr.Accordion("What was done and measured", open=False):
        report = gr.Markdown()

    inputs, outputs = [concept, targets, prompts, seed], [before, after, report, lora]
    button.click(erase, inputs, outputs, api_name="erase")
    concept.input(example, concept, prompts, api_name=False)
    demo.load(erase, inputs, outputs, api_name=False)

if __name__ == "__main__":
    demo.launch()
