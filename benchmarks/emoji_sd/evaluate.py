"""Measure an exported pipeline: its VAE, copying, and recognition of artist and thing by judges of real
images.

    python evaluate.py --data DATA --model emoji_sd --output EVALUATION

Writes rows.csv (one line an image), summary.csv (one line a group and artist), table.md, config.json,
grid.webp, held_out.webp and real.webp; words.csv and words.md say what is recognised when a misspelling or a
description stands for the name, apart for those that training saw and those that were held out. Several
values of --steps or --guidance are compared on --limit pairs in settings.csv, and nothing else is written.
"""

import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import torch
import transformers
from dataset import load_dataset
from diffusers import StableDiffusionPipeline
from grids import GRID_THINGS, draw_grid
from judges import Judges

from more_hf.core.files import write_json, write_text
from more_hf.data import FOLDER, load_lpips
from more_hf_bench.bootstrap import draw_means, interval
from more_hf_bench.columns import write_rows
from more_hf_bench.machine import weights_sha256
from more_hf_bench.script import argument_parser


PROMPT = "a {thing} in the style of {artist}"
# Undrawn: the artist has no such emoji, so there is nothing to compare with.
GROUPS = ("training", "held_out", "undrawn")


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Job:
    """One image to draw: what the prompt asks for, by number, and the seed of its noise."""

    prompt: str
    artist: int
    thing: int
    seed: int = 0

    def noise(self) -> torch.Generator:
        """Depends on artist, thing and seed alone, so every wording of a pair starts from the same noise."""
        return torch.Generator().manual_seed(100_000 * self.seed + 1_000 * self.artist + self.thing)


def pair_jobs(data, pairs: list[tuple[int, int]], seeds: int = 1) -> list[Job]:
    """Each (artist, thing) under both names, seed by seed."""
    return [
        Job(PROMPT.format(thing=data.things[t], artist=data.artists[a]), a, t, seed)
        for seed in range(seeds)
        for a, t in pairs
    ]


def generate(pipe, jobs: list[Job], steps: int, guidance: float, batch_size: int) -> torch.Tensor:
    """(len(jobs), 3, 64, 64) in [-1, 1], rounded to 8 bits.

    An image depends on its job alone, not on the batch it is made in.
    """
    images = []
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        output = pipe(
            [job.prompt for job in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[job.noise() for job in part],
            output_type="np",
        ).images
        images.append(torch.from_numpy((output * 255).round() / 127.5 - 1).permute(0, 3, 1, 2).float())
    return torch.cat(images)


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor) -> torch.Tensor:
    """The VAE's round trip of (n, 3, 64, 64), clamped."""
    parts = [
        vae.decode(vae.encode(x.to(vae.device)).latent_dist.mean).sample.clamp(-1, 1).cpu()
        for x in images.split(64)
    ]
    return torch.cat(parts)


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(n,) decibels a picture, for values in [-1, 1]."""
    return 10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))


def nearest(images: torch.Tensor, training: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """
    Root mean square distance to the nearest training image, in grey levels 0 to 255, and which one it is.
    """
    distance = torch.cdist(images.flatten(1), training.flatten(1)) / images[0].numel() ** 0.5 * 127.5
    value, index = distance.min(1)
    return value.double().numpy(), index.numpy()


def pair_groups(data) -> dict[str, list[tuple[int, int]]]:
    """(artist, thing) pairs: drawn and trained on, drawn and held out, never drawn."""
    drawn = {
        (a, t): bool(h)
        for a, t, h in zip(data.artist.tolist(), data.thing.tolist(), data.held_out.tolist(), strict=False)
        if t >= 0
    }
    every = [(a, t) for a in range(len(data.artists)) for t in range(len(data.things))]
    return {
        "training": [p for p in every if drawn.get(p) is False],
        "held_out": [p for p in every if drawn.get(p) is True],
        "undrawn": [p for p in every if p not in drawn],
    }


def judged_rows(data, judges, images, pairs, extra: dict) -> pd.DataFrame:
    """One row an image: what was asked, what the judges took it for, and the columns in `extra`."""
    artists, things = np.array([a for a, _ in pairs]), np.array([t for _, t in pairs])
    seen_artist, seen_thing = judges.judge(judges.describe(images), artists, things)
    columns = {
        "artist": [data.artists[a] for a in artists],
        "thing": [data.things[t] for t in things],
        "judged_artist": [data.artists[a] for a in seen_artist],
        "judged_thing": [data.things[t] for t in seen_thing],
        "artist_ok": (artists == np.asarray(seen_artist)).astype(int),
        "thing_ok": (things == np.asarray(seen_thing)).astype(int),
    }
    return pd.DataFrame(columns | extra)


def by_artist(rows: pd.DataFrame, keys: list[str], artists: list[str]) -> Iterator[tuple[dict, pd.DataFrame]]:
    """The rows of all artists, then of each, for every combination of keys, with the start of their line."""
    for values, part in rows.groupby(keys, sort=False):
        for artist in ("all", *artists):
            own = part if artist == "all" else part[part["artist"] == artist]
            if len(own):
                yield {**dict(zip(keys, values, strict=True)), "artist": artist, "n": len(own)}, own


def summarise(rows: pd.DataFrame, artists: list[str]) -> list[dict]:
    """One line for every source (generated, real, reconstructed), group and artist, and for all artists."""
    order = {"source": ["generated", "real", "reconstructed"], "group": list(GROUPS)}
    rows = rows.sort_values(list(order), key=lambda names: names.map(order[names.name].index), kind="stable")
    lines = []
    for line, own in by_artist(rows, list(order), artists):
        for key in ("artist", "thing"):
            values = 100 * own[f"{key}_ok"]
            low, high = interval(draw_means(values.tolist()))
            line |= {f"{key}_acc": values.mean(), f"{key}_low": low, f"{key}_high": high}
        if line["source"] != "reconstructed":
            line["nearest"] = own["nearest"].mean()
        lines.append({k: f"{v:.1f}" if isinstance(v, float) else v for k, v in line.items()})
    return lines


def write_table(path: Path, lines: list[dict], artists: list[str], codec: dict) -> None:
    """The summary as Markdown, artists across; read from the lines of summary.csv."""
    value = {
        (s["source"], s["group"], s["artist"], k): s[f"{k}_acc"] for s in lines for k in ("artist", "thing")
    }
    table = [f"| recognised, % | {' | '.join(artists)} | all |", "|---" * (len(artists) + 2) + "|"]
    for key in ("artist", "thing"):
        for group in GROUPS:
            for source in ("generated", "reconstructed", "real"):
                cells = [value.get((source, group, a, key), "") for a in (*artists, "all")]
                if any(cells):
                    table.append(
                        f"| {key}, {group.replace('_', ' ')} pairs, {source} | {' | '.join(cells)} |"
                    )
    table += ["", "| VAE | PSNR, dB | LPIPS |", "|---|---|---|"]
    table += [f"| {group} images | {v['psnr']:.2f} | {v['lpips']:.4f} |" for group, v in codec.items()]
    write_text(path, "\n".join(table) + "\n")


def word_jobs(data, things: int) -> dict[tuple[str, str], list[Job]]:
    """
    {(level, split): jobs}: artists by name, misspelling and description, and things by description; the split
    is `trained` or `held_out`. Every wording of an artist asks for the same things under the same noise.
    """
    described = json.loads((FOLDER / "emoji_descriptions.json").read_text())
    spread = range(0, len(data.things), max(1, len(data.things) // things))[:things]
    jobs = {}
    for a, artist in enumerate(data.artists):
        jobs.setdefault(("name", "trained"), []).extend(pair_jobs(data, [(a, t) for t in spread]))
        for level, splits in described["artists"][artist].items():
            shape = PROMPT if level == "variant" else "a {thing}, {artist}"
            for split, wordings in splits.items():
                # One wording a thing, in turn.
                jobs.setdefault((level, split), []).extend(
                    Job(shape.format(thing=data.things[t], artist=wordings[i % len(wordings)]), a, t)
                    for i, t in enumerate(spread)
                )
    for t, thing in enumerate(data.things):
        for split, wordings in described["things"].get(thing.replace(" ", "-"), {}).items():
            a = t % len(data.artists)
            prompt = PROMPT.format(thing=wordings[0], artist=data.artists[a])
            jobs.setdefault(("thing described", split), []).append(Job(prompt, a, t))
    return jobs


def summarise_words(
    data, judges, worded: dict[tuple[str, str], list[Job]], images: torch.Tensor
) -> list[dict]:
    """One line for every level, split and artist, and for all artists."""
    rows = []
    for (level, split), jobs in worded.items():
        part, images = images[: len(jobs)], images[len(jobs) :]
        pairs = [(job.artist, job.thing) for job in jobs]
        rows.append(judged_rows(data, judges, part, pairs, dict(level=level, split=split)))
    lines = []
    for line, own in by_artist(pd.concat(rows), ["level", "split"], data.artists):
        lines.append(
            line | {f"{key}_acc": f"{100 * own[f'{key}_ok'].mean():.1f}" for key in ("artist", "thing")}
        )
    return lines


def write_words(path: Path, lines: list[dict], artists: list[str]) -> None:
    """How often the artist is recognised at each level, artists across; the thing's share last."""
    value = {(s["level"], s["split"], s["artist"]): s for s in lines}
    table = [
        f"| artist recognised, % | {' | '.join(artists)} | all | thing |",
        "|---" * (len(artists) + 3) + "|",
    ]
    for level, split in dict.fromkeys((s["level"], s["split"]) for s in lines):
        found = [value.get((level, split, artist), {}).get("artist_acc", "") for artist in (*artists, "all")]
        thing = value[level, split, "all"]["thing_acc"]
        table.append(f"| {level}, {split.replace('_', ' ')} | {' | '.join(found)} | {thing} |")
    write_text(path, "\n".join(table) + "\n")


def compare_settings(pipe, data, judges, pairs, args) -> None:
    """Recognition for each of the steps and guidance values, on the same pairs and seeds."""
    lines = []
    for steps in args.steps:
        for guidance in args.guidance:
            start = time.monotonic()
            images = generate(pipe, pair_jobs(data, pairs, args.seeds), steps, guidance, args.batch_size)
            rate = len(images) / (time.monotonic() - start)
            rows = judged_rows(data, judges, images, pairs * args.seeds, {})
            accuracy = {f"{k}_acc": f"{100 * rows[f'{k}_ok'].mean():.1f}" for k in ("artist", "thing")}
            lines.append(
                dict(steps=steps, guidance=guidance, n=len(rows), **accuracy, images_per_second=f"{rate:.1f}")
            )
            print(lines[-1], flush=True)
    write_rows(args.output / "settings.csv", lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the StableDiffusionPipeline")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[12])
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0])
    parser.add_argument(
        "--seeds", type=int, default=1, help="images a training pair; held-out pairs get twice as many"
    )
    parser.add_argument("--limit", type=int, help="this many of the training pairs, evenly spread")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--smoke", action="store_true", help="a few pairs and two steps")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.limit = [2], 6
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)

    data = load_dataset(args.data)
    lpips_model = load_lpips()
    judges = Judges(data, lpips_model, args.output / "features.npy")
    pipe = load_pipeline(args.model)
    groups = pair_groups(data)
    if args.limit:
        groups["training"] = groups["training"][:: max(1, len(groups["training"]) // args.limit)]
    if len(args.steps) * len(args.guidance) > 1:
        compare_settings(pipe, data, judges, groups["training"], args)
        return

    draw = partial(generate, pipe, steps=args.steps[0], guidance=args.guidance[0], batch_size=args.batch_size)
    number = {
        (a, t): i
        for i, (a, t) in enumerate(zip(data.artist.tolist(), data.thing.tolist(), strict=False))
        if t >= 0
    }
    train_index = torch.nonzero(data.chosen & ~data.held_out).flatten()
    training = data.pixels(train_index)
    rows, codec = [], {}
    for group, pairs in groups.items():
        if not pairs:
            continue
        seeds = args.seeds * (2 if group == "held_out" else 1)
        start = time.monotonic()
        images = draw(pair_jobs(data, pairs, seeds))
        print(
            f"{group}: {len(images)} images, {len(images) / (time.monotonic() - start):.1f} a second",
            flush=True,
        )
        distance, which = nearest(images, training)
        extra = dict(
            source="generated",
            group=group,
            seed=np.repeat(np.arange(seeds), len(pairs)),
            nearest=distance.round(1),
        )
        extra["nearest_artist"] = [data.artists[a] for a in data.artist[train_index[which]]]
        extra["nearest_thing"] = [data.things[t] for t in data.thing[train_index[which]]]
        rows.append(judged_rows(data, judges, images, pairs * seeds, extra))
        if group == "undrawn":
            continue
        index = torch.tensor([number[p] for p in pairs])
        real = data.pixels(index)
        copies = reconstruct(pipe.vae, real)
        codec[group] = dict(
            psnr=psnr(real, copies).mean().item(), lpips=lpips_model(real, copies).mean().item()
        )
        others = torch.cdist(real.flatten(1), training.flatten(1))
        # A training image's nearest other training image.
        others[index[:, None] == train_index[None]] = torch.inf
        distance = (others.min(1).values / real[0].numel() ** 0.5 * 127.5).double().numpy().round(1)
        rows.append(
            judged_rows(data, judges, real, pairs, dict(source="real", group=group, nearest=distance))
        )
        rows.append(judged_rows(data, judges, copies, pairs, dict(source="reconstructed", group=group)))

    rows = pd.concat(rows).astype({"seed": "Int64"})  # real pictures have none
    lines = summarise(rows, data.artists)
    worded = word_jobs(data, 2 if args.smoke else 10)
    words = summarise_words(data, judges, worded, draw([job for jobs in worded.values() for job in jobs]))
    write_rows(args.output / "words.csv", words)
    write_words(args.output / "words.md", words, data.artists)
    write_rows(args.output / "rows.csv", rows)
    write_rows(args.output / "summary.csv", lines)
    write_table(args.output / "table.md", lines, data.artists, codec)
    config = {
        "command": " ".join(["evaluate.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])]),
        "prompt": PROMPT,
        "weights": weights_sha256(pipe),
        "steps": args.steps[0],
        "guidance": args.guidance[0],
        "seeds": args.seeds,
        "scheduler": type(pipe.scheduler).__name__,
        "image_size": 64,
        "lpips": "alex, 64 x 64",
        "vae": codec,
        "hardware": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    write_json(args.output / "config.json", config)

    asked = [
        (a, data.things.index(t)) for a in range(len(data.artists)) for t in GRID_THINGS if t in data.things
    ]
    if args.smoke:
        asked = [(a, t) for a in range(len(data.artists)) for t in range(2)]
    images = draw(pair_jobs(data, asked))
    draw_grid(args.output / "grid.webp", data, asked, images, groups)
    real = torch.stack(
        [data.pixels(torch.tensor([number[p]]))[0] if p in number else torch.ones(3, 64, 64) for p in asked]
    )
    draw_grid(args.output / "real.webp", data, asked, real, groups)
    held = groups["held_out"]
    held = [[p for p in held if p[0] == a][:10] for a in range(len(data.artists))]
    flat = [p for row in held for p in row]
    if flat:
        images = draw(pair_jobs(data, flat))
        draw_grid(args.output / "held_out.webp", data, flat, images, groups)
    print((args.output / "table.md").read_text())


if __name__ == "__main__":
    main()
