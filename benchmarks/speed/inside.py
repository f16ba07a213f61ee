"""What `reach="denoiser"` costs on a UNet of Stable Diffusion v1.4's size: seconds and memory, part by part.

    python benchmarks/speed/inside.py    # inside.csv, inside.md; 3 GB of weights, and what the table says

The pipeline is that of `speed.py`, random weights and float32, and pictures are as small as it draws: what
they cost grows with their pixels and steps, so it stands apart from what does not. Seconds are of the
processor. Memory is how far the process's peak has risen since the pipeline was there.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

from wide import peak

import more_hf
import speed
from more_hf.core.request import ConceptRequest
from more_hf.diffusion import erase
from more_hf.diffusion.plan import Solution
from more_hf_bench.script import argument_parser, write_table


LATENTS, STEPS, PICTURES = 8, 2, 4


class Clock:
    """The seconds and the peak of memory of each part of a call."""

    def __init__(self):
        self.lines: list[dict] = []
        self.start, self.before = time.process_time(), peak()

    def note(self, what: str, seconds: float) -> None:
        line = {"what": what, "seconds": round(seconds, 1), "MiB at most": round(peak() - self.before)}
        self.lines.append(line)

    @contextmanager
    def timed(self, owner: object, name: str, what: str) -> Iterator[None]:
        """Inside the block every call of this function is noted."""
        function: Callable = getattr(owner, name)

        def noted(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.note(what, time.process_time() - start)
            return result

        with patch.object(owner, name, noted):
            yield


def measure(unet: dict = speed.SD14, text: dict = speed.CLIP_L, pictures: int = PICTURES) -> list[dict]:
    """One line per part of a call of `erase_concept`, and one for the whole."""
    pipe = speed.sd14(unet, text)
    pipe.set_progress_bar_config(disable=True)
    side, latents = LATENTS * pipe.vae_scale_factor, f"{LATENTS}x{LATENTS}"
    request = ConceptRequest.of(
        speed.CONCEPT,
        remap_to=speed.TARGETS[:1],
        retain=speed.RETAIN,
        reach="denoiser",
        pictures=pictures,
        sampling={"num_inference_steps": STEPS, "height": side, "width": side},
    )
    clock = Clock()
    drawn = 5 * pictures  # of the concept, of its target, ordinary ones, and two of retained names for each
    with (
        clock.timed(erase, "solve", "prototypes of the prompts, and their remap"),
        clock.timed(erase, "record_activations", f"draw {drawn} pictures of {latents} latents, record"),
        clock.timed(Solution, "with_activations", "solve for every layer inside"),
    ):
        erase.erase(pipe, request)
    seconds = time.process_time() - clock.start
    clock.note("copy, merge, proof by run", seconds - sum(line["seconds"] for line in clock.lines))
    clock.note(f"the whole call: {len(more_hf.get_erasure(pipe).sites)} layers", seconds)
    return clock.lines


def main() -> None:
    argument_parser(__doc__).parse_args()
    write_table(speed.HERE / "inside", measure(), below=speed.machine())


if __name__ == "__main__":
    main()
