"""The edit of a Stable Diffusion v1.4 UNet next to the closed forms of UCE and RECE, as ratios in one run.

    python benchmarks/speed/speed.py    # speed.csv, speed.md

The UNet has v1.4's class and configuration and random weights, in float32; the text encoder is CLIP
ViT-L/14's, random too, with CLIP's own vocabulary, which OpenCLIP ships. Seconds are of the processor, so
that other programs count little: the least of several runs, and the most. What the two methods compute was
written for this file from their formulas, in the order of their scripts: layer by layer, one concept and
one retained name after the other, float32, an inverse for every layer. UCE's current script takes one vector
per name; its paper-era script, which RECE builds on, takes every position of every prompt. Their retained
features are random.
"""

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip import SimpleTokenizer
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import more_hf
from more_hf.diffusion import kept
from more_hf.diffusion.encoder import Encoder, fit_prototypes
from more_hf.diffusion.proof import prover
from more_hf.diffusion.sites import find_denoiser
from more_hf_bench.machine import hardware, versions
from more_hf_bench.methods.diffusion.closed_form import uce
from more_hf_bench.script import argument_parser, write_table


HERE = Path(__file__).parent
SD14 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
FIRST, CONCEPT, TARGETS = "Van Gogh", "Salvador Dali", ["Claude Monet", "Johannes Vermeer"]
RETAIN = ["Pablo Picasso", "Rembrandt", "Andy Warhol", "Caravaggio"]
NAMES = (4, 100)  # how many names UCE retains, one vector each
PROMPTS = (5, 100)  # how many prompts its paper-era script and RECE retain, 77 positions each
LATENT = 32  # pixels of the latents of the timed forward: 256 x 256 pictures


def sd14(unet: dict, text: dict) -> StableDiffusionPipeline:
    """A pipeline of these sizes with random weights."""
    vocabulary = SimpleTokenizer()
    tokenizer = CLIPTokenizer(
        vocab=vocabulary.encoder,
        merges=list(vocabulary.bpe_ranks),
        bos_token="<start_of_text>",
        eos_token="<end_of_text>",
        unk_token="<end_of_text>",
        pad_token="<end_of_text>",
        model_max_length=text["max_position_embeddings"],
    )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **text, **ids)).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet).eval().requires_grad_(False),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def closed_form(
    layers: list[Tensor], old: list[Tensor], new: list[Tensor], kept: list[Tensor], lamb: float, keep: float
) -> list[Tensor]:
    """
    One closed-form edit in the order of UCE's scripts: `old`, `new` and `kept` are lists of features
    `(positions, d)`.
    """
    edited = []
    for W in layers:
        left, right = lamb * W, lamb * torch.eye(W.shape[1]).to(W)
        for c, g in zip(old, new, strict=True):
            left = left + (g @ W.T).T @ c
            right = right + c.T @ c
        for r in kept:
            left = left + keep * (r @ W.T).T @ r
            right = right + keep * r.T @ r
        edited.append(left @ torch.inverse(right))
    return edited


def adversarial(layers: list[Tensor], edited: list[Tensor], c: Tensor, rho: float) -> Tensor:
    """
    RECE's embeddings `(positions, d)` that make edited layers give what the original layers make of `c`.
    """
    left, right = rho * torch.eye(c.shape[1]).to(c), c.new_zeros(c.shape[1], c.shape[1])
    for W, new in zip(layers, edited, strict=True):
        left, right = left + new.T @ new, right + new.T @ W
    return (torch.inverse(left) @ right @ c.T).T


def rece(layers: list[Tensor], c: Tensor, g: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """One epoch for one concept, its published settings for artists."""
    start = closed_form(layers, [c], [g], kept, 0.5, 0.1)
    return closed_form(start, [adversarial(layers, start, c, 1e-3)], [g], kept, 0.1, 0.1)


def seconds_of(call: Callable[[], object]) -> float:
    """Of the processor, for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def seconds(call: Callable[[], object], times: int = 3) -> list[float]:
    """Of several calls, after one that is not counted."""
    call()
    return [seconds_of(call) for _ in range(times)]


def whole_calls(pipe: StableDiffusionPipeline) -> dict[str, list[float]]:
    """
    The seconds of `erase_concept` with an empty cache, and of later ones that erase another name with what
    the first left in it, and of UCE's whole function in turn with these.
    """
    taken = {"first": [], "later": [], "UCE": []}

    def erase(concept: str) -> None:
        more_hf.erase_concept(pipe, concept, remap_to=TARGETS[:1], retain=RETAIN)

    taken["first"].append(seconds_of(lambda: erase(FIRST)))
    more_hf.restore(pipe)
    for _ in range(3):
        weights = {name: value.clone() for name, value in pipe.unet.state_dict().items() if "attn2" in name}
        taken["UCE"].append(seconds_of(lambda: uce(pipe, CONCEPT, remap_to=TARGETS[:1], retain=RETAIN)))
        pipe.unet.load_state_dict(weights, strict=False)
        taken["later"].append(seconds_of(lambda: erase(CONCEPT)))
        more_hf.restore(pipe)
    erase(CONCEPT)
    return taken


def measure(
    unet: dict = SD14, text: dict = CLIP_L, latent: int = LATENT, names=NAMES, prompts=PROMPTS
) -> list[dict]:
    """One line per thing timed: seconds, and how many times the merge alone and UCE's function that is."""
    with TemporaryDirectory() as cache, patch.object(kept, "CACHE", Path(cache)):
        return _measure(unet, text, latent, names, prompts)


@torch.no_grad()
def _measure(unet: dict, text: dict, latent: int, names: tuple, prompts: tuple) -> list[dict]:
    pipe = sd14(unet, text)
    whole = whole_calls(pipe)
    erasure = more_hf.get_erasure(pipe)
    remap, sites, layers = erasure.remap, list(erasure.sites.values()), list(erasure.originals.values())
    d = layers[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    lines = []

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def line(what: str, taken: list[float]) -> None:
        least = min(taken)
        lines.append(
            {
                "what": what,
                "seconds": round(least, 4),
                "at most": round(max(taken), 4),
                "times the merge": round(least / lines[0]["seconds"], 2) if lines else 1.0,
                "times UCE": round(least / min(whole["UCE"]), 2),
            }
        )

    def merge() -> None:
        for site, W in zip(sites, layers, strict=True):
            site.write(remap.merged(W))

    def copy_once() -> None:
        for site, W in zip(sites, layers, strict=True):
            site.write(W)

    line(f"more, the merge alone: {len(layers)} layers, rank {remap.rank}", seconds(merge))
    line("floor: read and write the edited matrices once", seconds(copy_once))
    for count in names:
        one = [[draw(1, d)] for _ in range(2)]
        kept = [draw(1, d) for _ in range(count)]
        taken = [seconds_of(lambda one=one, kept=kept: closed_form(layers, *one, kept, 0.5, 1.0))]
        line(
            f"UCE, closed form as its script computes it: 1 concept, {count} retained names, one vector each",
            taken,
        )
    positions = text["max_position_embeddings"]
    for count in prompts:
        c, g = draw(positions, d), draw(positions, d)
        kept = [draw(positions, d) for _ in range(count)]
        what = f"1 concept, {count} retained prompts, {positions} positions each"
        line(
            f"UCE, paper-era closed form: {what}",
            [seconds_of(lambda c=c, g=g, k=kept: closed_form(layers, [c], [g], k, 0.5, 0.1))],
        )
        line(
            f"RECE, closed form, one epoch: {what}",
            [seconds_of(lambda c=c, g=g, k=kept: rece(layers, c, g, k))],
        )

    one_pass = seconds(lambda: fit_prototypes(Encoder(pipe), [CONCEPT], "positions", sigma_prompts={}), 1)
    line("more, one prototype pass: the prompts of one name through the text encoder", one_pass)
    line("more, the whole call, the first with this text encoder", whole["first"])
    line("more, the whole call, later: Σ of everyday prompts from the cache", whole["later"])
    merge()
    denoiser = find_denoiser(pipe)
    edited = {name: site.read() for name, site in erasure.sites.items()}
    proof = [seconds_of(lambda: prover(denoiser, erasure, erasure)(edited))]
    line("of it the proof by run, three times through the UNet", proof)
    line(f"UCE, the whole function, prompts included: 1 concept, {len(RETAIN)} retained names", whole["UCE"])

    sample, prompt, t = draw(2, 4, latent, latent), draw(2, positions, d), torch.tensor(500)

    def forward() -> None:
        pipe.unet(sample, t, encoder_hidden_states=prompt)

    line(f"one UNet forward, two samples of {8 * latent} pixels, merged", seconds(forward, 2))
    more_hf.restore(pipe)
    more_hf.erase_concept(pipe, CONCEPT, remap_to=TARGETS, retain=RETAIN, router="hash")
    line("the same forward with the routing hook", seconds(forward, 2))
    hook = more_hf.get_erasure(pipe).hook
    line(
        "the routing hook alone", seconds(lambda: hook(pipe.unet, (), {"encoder_hidden_states": prompt}), 20)
    )
    return lines


def machine() -> str:
    """The processor and the versions of what ran on it."""
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    return f"{hardware(torch.device('cpu'))}; {packages}"


def main() -> None:
    argument_parser(__doc__).parse_args()
    write_table(HERE / "speed", measure(), below=machine())


if __name__ == "__main__":
    main()
