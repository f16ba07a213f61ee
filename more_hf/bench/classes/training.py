"""One recipe that trains every classifier of the knowledge-deletion benchmark: AdamW, cosine learning rate, shifted and mirrored images.

A step's batch and its augmentation are functions of (seed, step), so a run that was killed needs only its last checkpoint to end exactly
where the run that was never stopped does. Under `accelerate launch` every process takes its share of each batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, PreTrainedModel

from ...core.errors import MoreError
from ...core.files import write_text
from ..columns import write_rows
from ..machine import processes
from ..splits import ImageSet


class TrainingError(MoreError, ValueError):
    """The folder holds another training."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters. The learning rate rises over `warmup_steps` and falls to zero with the cosine of what is done."""

    epochs: int = 8
    batch_size: int = 128  # over all processes
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    shift: int = 2  # images are moved by up to this many pixels
    flip: bool = True  # and every second one is mirrored
    seed: int = 0


@dataclass
class Progress:
    """What a checkpoint knows besides weights and optimiser: the step, the running sums of the epoch, and the log's rows."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def train_classifier(
    model: PreTrainedModel,
    train: ImageSet,
    recipe: Recipe,
    *,
    output: str | Path,
    validation: ImageSet | None = None,
    mixed_precision: str | None = None,
    workers: int = 0,
    save_seconds: float = 60.0,
    desc: str = "training",
) -> PreTrainedModel:
    """Train until the recipe's last step, going on from the checkpoint in `output` if there is one; a finished training is only loaded.

    Args:
        model (`PreTrainedModel`): trained in place, on accelerate's device. Dropout, if it has any, draws from the global random state,
            which is seeded here.
        train (`ImageSet`): the training images.
        recipe (`Recipe`): the hyper-parameters.
        output (`str` or `Path`): gets `training.json` (what is trained), `log.csv` (a row per epoch), `checkpoint-STEP` while it runs, and
            `model` (what `save_pretrained` writes) at the end. Each is written beside its place and renamed.
        validation (`ImageSet`, *optional*): its accuracy goes into the log after each epoch.
        mixed_precision (`str`, *optional*): `"bf16"` or `"fp16"` on CUDA; by default what accelerate is configured for.
        workers (`int`, defaults to 0): processes that decode images.
        save_seconds (`float`, defaults to 60): between checkpoints.
        desc (`str`): in front of the progress bar.

    Returns:
        `PreTrainedModel`: the trained model in evaluation mode.

    Raises:
        `TrainingError`: before anything is changed, if `output` holds another training.
    """
    output = Path(output)
    _claim(output, model, train, recipe)
    if (output / "model").is_dir():
        return AutoModelForImageClassification.from_pretrained(output / "model").eval().to(processes().device)
    processes()  # decides about the device before accelerate does
    accelerator = Accelerator(mixed_precision=mixed_precision)
    accelerator.wait_for_everyone()  # everyone has looked before one writes
    set_seed(recipe.seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if checkpoints := sorted(output.glob("checkpoint-*"), key=_step_of):
        accelerator.load_state(str(checkpoints[-1]))

    world = accelerator.num_processes
    steps_per_epoch = math.ceil((len(train) - world + 1) / recipe.batch_size)  # no batch in which a process would have no image
    steps = recipe.epochs * steps_per_epoch
    batches = Batches(len(train), recipe, steps_per_epoch, range(progress.step, steps), slice(accelerator.process_index, None, world))
    saved_at = clock = time.monotonic()
    bar = tqdm(total=steps, initial=progress.step, desc=desc, unit="step")
    for batch in DataLoader(train, batch_size=None, sampler=batches, num_workers=workers):
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + progress.step)
        pixels = augment(batch["pixel_values"], recipe.shift, recipe.flip, draw, batches.size(progress.step), batches.share)
        pixels = pixels.to(accelerator.device, memory_format=torch.channels_last)
        labels = batch["labels"].to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress.step, steps)
        with accelerator.autocast():
            logits = prepared(pixel_values=pixels).logits
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        accelerator.backward(loss * world / batches.size(progress.step))  # gradients are averaged over processes
        accelerator.clip_grad_norm_(prepared.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        now = time.monotonic()
        progress.seconds, clock = progress.seconds + now - clock, now
        progress.loss += loss.item()
        progress.correct += int((logits.argmax(1) == labels).sum())
        progress.seen += len(labels)
        progress.step += 1
        bar.update()
        if progress.step % steps_per_epoch == 0:
            _end_epoch(progress, recipe, steps_per_epoch, model, validation)
            if accelerator.is_main_process:
                write_rows(output / "log.csv", progress.rows)
            model.train()
        # the main process decides, since clocks differ
        if accelerator.reduce(torch.tensor(float(accelerator.is_main_process and now - saved_at > save_seconds))) > 0:
            _save(accelerator, output, progress.step)
            saved_at = time.monotonic()
    bar.close()

    model.eval().to(memory_format=torch.contiguous_format)
    if accelerator.is_main_process:
        model.save_pretrained(output / ".model.part")
        (output / ".model.part").rename(output / "model")
        for checkpoint in output.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()
    return model


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up times the cosine from 1 to 0."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def augment(pixels: Tensor, shift: int, flip: bool, generator: torch.Generator, whole: int, share: slice) -> Tensor:
    """Move each image `(n, channels, H, W)` by up to `shift` pixels, edges repeated, and mirror every second one at random.

    The images are the `share` of a batch of `whole`, for all of which is drawn, so that an image's draw does not depend on the sharding.
    """
    moves = torch.randint(0, 2 * shift + 1, (2, whole, 1), generator=generator)[:, share]
    mirrored = (torch.rand(whole, 1, generator=generator) < 0.5)[share] & flip
    n, _, height, width = pixels.shape
    columns = torch.arange(width).expand(n, width)
    rows = torch.arange(height) + moves[0]
    columns = torch.where(mirrored, columns.flip(1), columns) + moves[1]
    padded = pad(pixels, (shift,) * 4, mode="replicate").permute(0, 2, 3, 1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def predict(model: PreTrainedModel, images: ImageSet, batch_size: int = 500) -> Tensor:
    """`(n,)`, int64 on the CPU: the class with the largest logit, in evaluation mode, which is left as it was."""
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    found = [model(pixel_values=batch["pixel_values"].to(device)).logits.argmax(1).cpu() for batch in images.loader(batch_size)]
    model.train(mode)
    return torch.cat(found)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of `(n,)` predictions that are right; NaN for none."""
    return 100 * (predicted == labels).double().mean().item()


class Batches:
    """The indices of each step's batch, this process's share of it. An epoch is one permutation; its last batch may be shorter."""

    def __init__(self, count: int, recipe: Recipe, steps_per_epoch: int, steps: range, share: slice):
        self.count, self.recipe, self.steps_per_epoch, self.steps, self.share = count, recipe, steps_per_epoch, steps, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Tensor]:
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if place == 0 or step == self.steps[0]:
                order = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.recipe.seed * 7_919 + epoch))
            start = place * self.recipe.batch_size
            yield order[start : start + self.recipe.batch_size][self.share]

    def size(self, step: int) -> int:
        """Of a step's batch, over all processes."""
        return min(self.recipe.batch_size, self.count - step % self.steps_per_epoch * self.recipe.batch_size)


def _end_epoch(progress: Progress, recipe: Recipe, steps_per_epoch: int, model: PreTrainedModel, validation: ImageSet | None) -> None:
    """Add the epoch's row and start the sums again. Under several processes the training columns are those of the main process's share."""
    row = {
        "epoch": progress.step // steps_per_epoch,
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "learning_rate": float(f"{learning_rate(recipe, progress.step - 1, recipe.epochs * steps_per_epoch):.4g}"),
        "loss": round(progress.loss / progress.seen, 5),
        "accuracy_training": round(100 * progress.correct / progress.seen, 3),
    }
    if validation is not None:
        row["accuracy_validation"] = round(accuracy(predict(model, validation), validation.labels), 3)
    progress.rows.append(row)
    progress.loss, progress.correct, progress.seen = 0.0, 0, 0


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _save(accelerator: Accelerator, output: Path, step: int) -> None:
    """Write a checkpoint beside its place, rename it, and only then remove the older ones."""
    beside, place = output / ".checkpoint.part", output / f"checkpoint-{step}"
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beside.rename(place)
        for older in output.glob("checkpoint-*"):
            if older != place:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def _claim(output: Path, model: PreTrainedModel, train: ImageSet, recipe: Recipe) -> None:
    """Note what is trained here, or check that it is this."""
    digest = hashlib.sha256(train.rows.numpy().tobytes() + train.labels.numpy().tobytes()).hexdigest()
    ours = {
        "model": type(model).__name__,
        "config": {key: value for key, value in model.config.to_diff_dict().items() if key != "transformers_version"},
        "recipe": asdict(recipe),
        "images": len(train),
        "images_sha256": digest,
        "image_size": train.image_size,
    }
    ours = json.loads(json.dumps(ours))
    path = output / "training.json"
    if not path.is_file():
        return write_text(path, json.dumps(ours, indent=1))
    theirs = json.loads(path.read_text("utf-8"))
    if differing := [key for key in ours if ours[key] != theirs.get(key)]:
        key = differing[0]
        raise TrainingError(f"{output} holds another training: its {key} is {theirs.get(key)}, here {ours[key]}. Choose another folder.")
