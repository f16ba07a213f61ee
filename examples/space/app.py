"""A Space that erases an emoji artist while you watch: pick one and a target, compare, take the LoRA home."""

import tempfile
from pathlib import Path

import gradio as gr
import torch
from diffusers.utils import make_image_grid
from PIL import Image

import more_hf
from more_hf.data import EMOJI_ARTISTS


THINGS = [
    "cat face",
    "rocket",
    "pizza",
    "sunflower",
    "house",
    "guitar",
    "crab",
    "bicycle",
    "red heart",
    "mushroom",
]


def draw(pipe, prompt, seed):
    """Four pictures, three times their size."""
    generators = [torch.Generator().manual_seed(int(seed) + i) for i in range(4)]
    images = pipe([prompt] * 4, generator=generators, num_inference_steps=10, guidance_scale=4.0).images
    return make_image_grid(
        [image.resize((192, 192), Image.Resampling.LANCZOS) for image in images], rows=2, cols=2
    )


def erase(concept, targets, thing, style, seed):
    """Before, after, what was measured, and the LoRA file."""
    pipe = more_hf.load_emoji_sd()  # a second's work, and no visitor sees another's erasure
    prompt = f"a {thing} in the style of {style or concept}"
    before = draw(pipe, prompt, seed)
    try:
        more_hf.erase_concept(pipe, concept, remap_to=targets or None)
    except more_hf.MoreError as error:
        raise gr.Error(str(error)) from error
    after = draw(pipe, prompt, seed)
    name = f"without_{concept.lower().replace(' ', '_')}.safetensors"
    lora = more_hf.save_lora(pipe, Path(tempfile.mkdtemp()) / name)
    return before, after, more_hf.get_erasure(pipe).to_markdown(), str(lora)


with gr.Blocks(title="more_hf", delete_cache=(3600, 3600)) as demo:
    gr.Markdown(
        "# Make a pipeline forget\n"
        "One call, in closed form, on a small Stable Diffusion over ten emoji artists."
    )
    with gr.Row():
        concept = gr.Dropdown(EMOJI_ARTISTS, value="High Contrast", label="Forget")
        targets = gr.Dropdown(
            EMOJI_ARTISTS,
            value=["Fluent"],
            multiselect=True,
            label="and draw instead (nothing: project it out)",
        )
    with gr.Row():
        thing = gr.Dropdown(THINGS, value="rocket", allow_custom_value=True, label="Thing")
        style = gr.Dropdown(
            [("the forgotten one", ""), *((name, name) for name in EMOJI_ARTISTS)],
            value="",
            label="in the style of",
        )
        seed = gr.Number(0, precision=0, label="Seed")
    button = gr.Button("Erase", variant="primary")
    with gr.Row():
        before = gr.Image(label="Before", format="png")
        after = gr.Image(label="After, from the same noise", format="png")
    lora = gr.File(label="The erasure as a LoRA for diffusers")
    with gr.Accordion("What was done and measured", open=False):
        report = gr.Markdown()
    button.click(
        erase, [concept, targets, thing, style, seed], [before, after, report, lora], api_name="erase"
    )

if __name__ == "__main__":
    demo.launch()
