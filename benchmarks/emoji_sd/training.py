"""What the training scripts share: checkpoints that survive a kill, learning rate, EMA, batches by step,
logs.

Everything random in a step comes from a generator seeded with (seed, step), and the batch of a step is a
function of the step, so a resumed run needs no more than the step's number to go on exactly as the run that
was never stopped.
"""

import argparse
import csv
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.upsampling import Upsample2D

from more_hf.core.files import replacing


def add_arguments(parser: argparse.ArgumentParser, steps: int, batch_size: int, learning_rate: float) -> None:
    """The flags that both training scripts have."""
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that data.py wrote")
    add("--output", type=Path, required=True, help="checkpoint.pt, log.csv and the EMA model go here")
    add(
        "--steps",
        type=int,
        default=steps,
        help="the learning rate reaches zero here, unless --minutes is given",
    )
    add("--minutes", type=float, help="anneal over this much training time instead, earlier runs counted in")
    add("--batch_size", type=int, default=batch_size)
    add("--learning_rate", type=float, default=learning_rate)
    add("--warmup_steps", type=int, default=200)
    add("--ema_decay", type=float, default=0.999)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    add("--compile", action="store_true", help="torch.compile the model: 1.4 times as fast on a CPU")
    add("--threads", type=int, help="CPU threads")
    add("--save_seconds", type=float, default=100)
    add("--log_every", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="a tiny model and a few steps, to see that the script runs")


def start(
    parser: argparse.ArgumentParser, *, smoke_steps: int, smoke_batch_size: int
) -> tuple[argparse.Namespace, Accelerator]:
    """Read the flags, of which --smoke replaces some, set threads and seed, and let accelerate begin."""
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch_size = min(args.steps, smoke_steps), smoke_batch_size
        args.warmup_steps, args.log_every = 5, 5
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args, Accelerator(mixed_precision=args.mixed_precision)


def compiled(model: torch.nn.Module, *functions):
    """
    Compile functions of a model, but not its upsampling: torch 2.13's CPU backend gives that a zero gradient.
    """
    for module in model.modules():
        if isinstance(module, Upsample2D):
            module.forward = torch.compiler.disable(module.forward)
    return [torch.compile(function) for function in functions]


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU whatever the device, so every device sees the same noise."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """(batch_size,) int64: the step's slice of an endless row of permutations of `count` samples."""
    position, picked = step * batch_size, []
    while len(picked) < batch_size:
        epoch, start = divmod(position + len(picked), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7_919 + epoch))
        picked += order[start : start + batch_size - len(picked)].tolist()
    return torch.tensor(picked, dtype=torch.int64)


def save_atomically(state: dict, path: Path) -> None:
    """Write a checkpoint and flush it to disk: a kill at any moment leaves the old file or the new one."""
    with replacing(path) as draft, open(draft, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


class Trainer:
    """
    One model with its optimiser, EMA copy, step counter and log. `model` and `ema` have the same layout.
    """

    def __init__(self, args, accelerator, model, ema, columns: tuple[str, ...], weight_decay: float = 0.0):
        self.args, self.accelerator, self.ema = (
            args,
            accelerator,
            ema.requires_grad_(False).to(accelerator.device),
        )
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, args.learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        self.raw = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.pairs = [
            (e, m) for e, m in zip(ema.parameters(), model.parameters(), strict=False) if m.requires_grad
        ]
        self.columns = ("step", "seconds", "learning_rate", *columns)
        self.sums, self.since_log = dict.fromkeys(columns, 0.0), 0
        self.step, self.seconds = 0, 0.0
        self.path = args.output / "checkpoint.pt"
        self.log_path = args.output / "log.csv"
        if self.path.exists():
            self.load()
        self.trim_log()
        self.saved_at = self.clock = time.monotonic()

    def load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.raw.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.sums, self.since_log = state["sums"], state["since_log"]
        print(f"resumed at step {self.step} after {self.seconds:.0f} s of training", flush=True)

    def save(self) -> None:
        state = dict(
            model=self.raw.state_dict(), ema=self.ema.state_dict(), optimizer=self.optimizer.state_dict()
        )
        state |= dict(step=self.step, seconds=self.seconds, sums=self.sums, since_log=self.since_log)
        save_atomically(state, self.path)
        self.saved_at = time.monotonic()

    def trim_log(self) -> None:
        """Drop the rows that a killed run wrote after its last checkpoint; they will be written again."""
        rows = []
        if self.log_path.exists():
            with open(self.log_path) as file:
                # A torn last line is short.
                lines = [line for line in csv.reader(file) if len(line) == len(self.columns)]
            rows = lines[1:]
        self.args.output.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "w", newline="") as file:
            csv.writer(file).writerows([self.columns, *(r for r in rows if int(r[0]) <= self.step)])

    def progress(self) -> float:
        """
        How much of the schedule is done, 0 to 1: by steps (exact on resume), or by time with a deadline.
        """
        if self.args.minutes is not None:
            return min(1.0, self.seconds / (60 * self.args.minutes))
        return min(1.0, self.step / self.args.steps)

    def running(self) -> bool:
        return self.progress() < 1

    def update(self, objective: torch.Tensor, **values: float) -> None:
        """Backward pass, clipped AdamW step at the scheduled rate, EMA; logs and saves when it is time."""
        args = self.args
        warmup = min(1.0, (self.step + 1) / args.warmup_steps)
        rate = args.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * self.progress()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.accelerator.backward(objective)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # A young EMA forgets its random start.
        decay = min(args.ema_decay, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_([e for e, _ in self.pairs], [m for _, m in self.pairs], 1 - decay)

        now = time.monotonic()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        for name, value in values.items():
            self.sums[name] += float(value)
        self.since_log += 1
        if self.step % args.log_every == 0:
            means = {name: total / self.since_log for name, total in self.sums.items()}
            row = [self.step, f"{self.seconds:.1f}", f"{rate:.3g}", *(f"{v:.5f}" for v in means.values())]
            with open(self.log_path, "a", newline="") as file:
                csv.writer(file).writerow(row)
            print(" ".join(f"{k} {v}" for k, v in zip(self.columns, row, strict=False)), flush=True)
            self.sums, self.since_log = dict.fromkeys(self.sums, 0.0), 0
        if now - self.saved_at > args.save_seconds:
            self.save()
