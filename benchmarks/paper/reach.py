"""What `reach="denoiser"` costs at the sizes of published models, counted as `cost.py` counts.

    python benchmarks/paper/reach.py    # reach.csv, reach.md

Denoisers are built from their configurations, on tensors without data, and their layers are heard as an
erasure hears them: that says how wide each moment is. The name's own edit and the proof, a few passes over a
tiny latent, are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import median

import torch
from cost import BFLOAT16, FLOAT32, HERE, operations
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from more_hf.core.request import ConceptRequest
from more_hf.data import FOLDER
from more_hf.diffusion.activations import BATCH, LEVELS, PARTS, POSITIONS, _Recorder, find_listeners
from more_hf.diffusion.families import family_of
from more_hf.diffusion.sites import Denoiser
from more_hf_bench.columns import read_rows
from more_hf_bench.script import argument_parser, write_table


PICTURES = ConceptRequest.pictures
FLOAT64 = 6e12  # operations a second on an A100
CORE = 2e10  # operations in float64 a second on one core, where the systems are solved
META = torch.device("meta")


@dataclass(frozen=True)
class Model:
    """A denoiser and what it is called with."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]  # of so many rows
    steps: int  # of a picture
    halves: int = 2  # rows of a picture: with guidance two


@dataclass(frozen=True)
class Work:
    """What an erasure inside a denoiser computes and keeps."""

    picture: float  # operations of one picture
    pictures: float  # of all pictures, drawn and shown
    sums: float  # of the second moments
    systems: float  # of solving with them
    writing: float  # of the new weights
    moments: float  # bytes

    @property
    def pictures_worth(self) -> float:
        """All of it, in pictures."""
        return (self.pictures + self.sums + self.systems + self.writing) / self.picture


class Widths(_Recorder):
    """Hears of each space how many of its positions count, and how wide it is."""

    def __init__(self) -> None:
        super().__init__((), (), negatives_last=False, resting=META)
        self.found: dict[str, tuple[int, int]] = {}

    def _add(self, space: str, z: Tensor) -> None:
        positions, width = z.shape[1:]
        self.found[space] = ceil(positions / ceil(positions / POSITIONS)), width


def work_of(model: Model, pictures: int = PICTURES, *, retained: bool = False) -> Work:
    """Count an erasure of one name, with or without retained ones."""
    with META:
        denoiser = model.build()
        inputs = model.inputs(model.halves)
    listeners = find_listeners(Denoiser("denoiser", denoiser, family_of(denoiser)))
    widths = Widths()
    widths.start("a name", pictures=1)
    with widths.listening([denoiser], listeners):
        step = operations(denoiser, **inputs)
    others = (1, 2) if retained else (2,)  # how many times as many pictures
    sums = systems = moments = 0
    for positions, width in widths.found.values():
        own = pictures * LEVELS * positions
        # the concept's, and both halves of ordinary pictures and those of retained names
        for rows in (own, *(model.halves * share * own for share in others)):
            moments += 8 * min(rows, width) * width
            sums += 2 * rows * width**2
        systems += width**3 / 3
    layers = [listeners[name].weight for name in widths.spaces]
    return Work(
        picture=model.steps * step,
        pictures=(2 + sum(others)) * pictures * (model.steps + LEVELS + 1) * step,
        sums=sums,
        systems=systems,
        writing=sum(4 * PARTS * weight.numel() for weight in layers),
        moments=moments,
    )


def memory_of(model: Model) -> float:
    """Bytes that a batch of pictures takes at most beside the weights, all in half precision."""
    tracker = MemTracker()
    torch.set_default_dtype(torch.float16)
    try:
        with FakeTensorMode(), tracker, torch.no_grad():
            denoiser = model.build()
            denoiser(**model.inputs(model.halves * BATCH))
    finally:
        torch.set_default_dtype(torch.float32)
    weights = 2 * sum(weight.numel() for weight in denoiser.parameters())
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - weights


def of_a_unet(width: int, side: int, channels: int = 4, **more: int) -> Callable[[int], dict[str, Tensor]]:
    """Inputs of a UNet: the text's width, the latents' side and channels, and widths of added conditions."""

    def inputs(rows: int) -> dict:
        found = {
            "sample": torch.empty(rows, channels, side, side),
            "timestep": torch.ones(rows),
            "encoder_hidden_states": torch.empty(rows, 77, width),
        }
        added = {name: torch.empty(rows, size) for name, size in more.items()}
        return {**found, "added_cond_kwargs": added} if more else found

    return inputs


def of_sd3(rows: int) -> dict[str, Tensor]:
    """Pictures of 1024 pixels, 77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": torch.empty(rows, 16, 128, 128),
        "encoder_hidden_states": torch.empty(rows, 333, 4096),
        "pooled_projections": torch.empty(rows, 2048),
        "timestep": torch.ones(rows),
    }


def of_flux(rows: int) -> dict[str, Tensor]:
    """Pictures of 1024 pixels, 512 tokens of T5."""
    return {
        "hidden_states": torch.empty(rows, 4096, 64),
        "encoder_hidden_states": torch.empty(rows, 512, 4096),
        "pooled_projections": torch.empty(rows, 768),
        "timestep": torch.ones(rows),
        "guidance": torch.ones(rows),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
    }


SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}


def unet(folder: str) -> Callable[[], nn.Module]:
    """Builds a packaged UNet's form."""
    return lambda: UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(FOLDER / folder / "unet")
    )


SDXL = of_a_unet(2048, 128, text_embeds=1280, time_ids=6)
MODELS = (
    Model("Stable Diffusion v1.4", unet("configs/sd-1"), of_a_unet(768, 64), 50),
    Model(
        "Stable Diffusion XL", unet("configs/sdxl"), of_a_unet(2048, 128, text_embeds=1280, time_ids=6), 50
    ),
    Model("Stable Diffusion 3 medium", lambda: SD3Transformer2DModel(**SD3), of_sd3, 28),
    Model("FLUX.1", lambda: FluxTransformer2DModel(guidance_embeds=True), of_flux, 28, halves=1),
)


def line_of(model: Model) -> dict[str, str]:
    """A row of the table."""
    work = work_of(model)
    half, single = (work.pictures / rate + work.sums / FLOAT64 for rate in (BFLOAT16, FLOAT32))
    return {
        "denoiser": model.name,
        "in pictures": f"{work.pictures_worth:,.0f}",
        "minutes in half precision": f"{half / 60:.0f}",
        "in float32": f"{single / 60:.0f}",
        "of a core": f"{work.systems / CORE / 60:.1f}",
        "GB of moments": f"{work.moments / 1e9:.1f}",
    }


def notes() -> str:
    """A batch's memory, and what was measured on the embedded pipeline beside what is counted."""
    folder, steps = HERE.parent / "artists" / "reach", 10
    costs = {"more": [], "more-denoiser": []}
    for line in read_rows(folder / "summary.csv").itertuples():
        if line.method in costs and line.forget != "all":
            costs[line.method].append(line.seconds_prepare)
    name, inside = map(median, costs.values())
    picture = read_rows(folder / "rows.csv")["seconds"].median()
    work = work_of(Model("", unet("emoji_sd"), of_a_unet(256, 8, 32), steps), retained=True)
    return (
        f"{BATCH} pictures of {MODELS[0].name} take {memory_of(MODELS[0]) / 1e9:.1f} GB in half precision. "
        f"Measured on the embedded pipeline, with retained names and pictures of {steps} steps: "
        f"{(inside - name) / picture:.0f} pictures by seconds (`artists/reach`, one core, the median of "
        f"{len(costs['more'])} names), {work.pictures_worth:.0f} counted."
    )


def main() -> None:
    argument_parser(__doc__).parse_args()
    write_table(HERE / "reach", [line_of(model) for model in MODELS], below=notes())


if __name__ == "__main__":
    main()
