"""The training of every classifier: AdamW, a cosine learning rate, shifted and mirrored images.

A step's batch and its augmentation are functions of (seed, step). So a run that was killed needs only its
last checkpoint to end exactly as the uninterrupted run does. Under `accelerate launch` every process takes
its share of each batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from more_hf.core.files import write_json

from ..columns import read_cells, write_rows
from ..errors import BenchmarkError
from ..machine import processes
from ..splits import ImageSet, KDData
from .models import MODELS, build_classifier, load_pretrained


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of a training."""

    epochs: int = 8
    batch_size: int = 128  # over all processes
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    warmup_steps: int = 100  # over which the learning rate rises; then it falls to zero with a cosine
    max_grad_norm: float = 1.0
    shift: int = 2  # images are moved by up to this many pixels
    flip: bool = True  # whether every second image, at random, is mirrored
    seed: int = 0

    @classmethod
    def of(cls, data: KDData, model: str | None = None, **given: float | None) -> Recipe:
        """
        The recipe for a data set, or for fine-tuning a pretrained `model` on it, with the values that are
        `given`. A classifier that was trained for the data set's classes is taken as it is: in 0 epochs.
        """
        recipe = RECIPES.get(f"{data.name}, {model}", RECIPES.get(data.name, cls()))
        if model is not None and model not in MODELS:
            config = AutoConfig.from_pretrained(model)
            recipe = FINE_TUNING.get(config.model_type, FINE_TUNING["vit"])
            if tuple(config.id2label.values()) == data.class_names:
                recipe = replace(recipe, epochs=0)
        given = {name: value for name, value in given.items() if value is not None}
        return replace(recipe, flip=data.flip, **given)


RECIPES = {
    "digits": Recipe(epochs=30, batch_size=64, warmup_steps=20, shift=1),
    # Boundary Unlearning's AllCNN, whose training ESC takes over: 50 epochs, batches of 64, mirrored images
    "cifar10": Recipe(epochs=50, batch_size=64, shift=0),
    # SalUn's ResNet-18: 182 epochs, batches of 256, images moved by up to 4 pixels
    "cifar10, resnet18": Recipe(epochs=182, batch_size=256, shift=4),
    "fashion-mnist-6000": Recipe(epochs=25, warmup_steps=50, shift=0),  # every image as it is, to the end
    "emoji-100": Recipe(epochs=12),
}
"""Recipes of data sets for which the default does not fit."""

FINE_TUNING = {
    # transformers' guide to image classification: AdamW at 5e-5, 3 epochs, a tenth of warm-up, no decay
    "vit": Recipe(epochs=3, learning_rate=5e-5, weight_decay=0.0),
    # jialicheng/resnet-18-cifar100-42 on the Hub, 72 % of CIFAR-100's test images: 10 epochs at 2e-5 and
    # batches of 32; with batches of 128 the rate is four times as high
    "resnet": Recipe(epochs=10, learning_rate=8e-5, weight_decay=0.0),
}
"""Recipes by `model_type` for pretrained classifiers, which the rate of a training from random weights would
destroy; that of ViT for all others."""


@dataclass(frozen=True)
class Trainer:
    """The classifiers of a benchmark: each is trained once, into its folder, and loaded from there."""

    model: str  # a name of `MODELS`, or the folder or Hub id of a pretrained classifier
    data: KDData  # what they are trained on
    recipe: Recipe  # how; the seed is that of each training
    folder: Path  # holds the trainings
    mixed_precision: str | None = None  # as in `train_classifier`

    def original(self, seed: int) -> PreTrainedModel:
        """The classifier of all training images."""
        return self._train(self.data.train, seed, self.folder_of(seed))

    def folder_of(self, seed: int) -> Path:
        """Where the classifier of all training images lies."""
        return self._folder(f"seed{seed}")

    def retrained(self, images: ImageSet, forget: str, seed: int) -> PreTrainedModel:
        """The classifier of `images`, which are those without `forget`."""
        return self._train(images, seed, self._folder(without(forget, seed)))

    def seconds(self, forget: str, seed: int) -> float:
        """The time that a retraining took, from its log."""
        return float(read_cells(self._folder(without(forget, seed)) / "log.csv")[-1]["seconds"])

    def _folder(self, name: str) -> Path:
        return self.folder / f"{Path(self.data.name).name}-{Path(self.model).name}-{name}"

    def _train(self, images: ImageSet, seed: int, folder: Path) -> PreTrainedModel:
        build = build_classifier if self.model in MODELS else load_pretrained
        model = build(self.model, self.data, seed=seed)
        return train_classifier(
            model,
            images,
            replace(self.recipe, seed=seed),
            output=folder,
            mixed_precision=self.mixed_precision,
            desc=folder.name,
        )


def without(forget: str, seed: int) -> str:
    """The end of a retraining's folder name.

    It has a hash where a hundred classes would make it too long for a file system.
    """
    name = forget.replace("/", "_")
    if len(name) > 100:
        name = hashlib.sha256(forget.encode()).hexdigest()[:16]
    return f"without-{name}-seed{seed}"


@dataclass
class Progress:
    """The step, running sums and log of a checkpoint, besides weights and optimiser."""

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
    save_seconds: float = 60.0,
    desc: str = "training",
) -> PreTrainedModel:
    """Train a classifier, or continue from the checkpoint in `output`; a finished one is only loaded.

    Args:
        model (`PreTrainedModel`): trained in place, on accelerate's device. Its dropout, if any, draws from
            the global random state, which is seeded here.
        train (`ImageSet`): the training images.
        recipe (`Recipe`): the hyper-parameters.
        output (`str` or `Path`): gets `training.json` (the configuration of the training), `log.csv` (a row
            per epoch), `checkpoint-STEP` while it runs, and `model` (the files of `save_pretrained`) at the
            end, each atomically.
        validation (`ImageSet`, *optional*): its accuracy goes into the log after each epoch.
        mixed_precision (`str`, *optional*): `"bf16"` or `"fp16"` on CUDA; by default as accelerate is
            configured.
        save_seconds (`float`, defaults to 60): between checkpoints.
        desc (`str`): in front of the progress bar.

    Returns:
        `PreTrainedModel`: the trained model in evaluation mode.

    Raises:
        `BenchmarkError`: before anything is changed, if `output` holds another training.
    """
    output = Path(output)
    _claim(output, model, train, recipe)
    if (output / "model").is_dir():
        trained = AutoModelForImageClassification.from_pretrained(output / "model")
        return trained.eval().to(processes().device)

    processes()  # decides about the device before accelerate does
    accelerator = Accelerator(mixed_precision=mixed_precision)
    accelerator.wait_for_everyone()  # no process writes before all have looked
    set_seed(recipe.seed)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if checkpoints := sorted(output.glob("checkpoint-*"), key=_step_of):
        accelerator.load_state(str(checkpoints[-1]))

    world = accelerator.num_processes
    # A last batch in which some process would have no image is left out.
    steps_per_epoch = math.ceil((len(train) - world + 1) / recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    share = slice(accelerator.process_index, None, world)
    batches = Batches(len(train), recipe, steps_per_epoch, range(progress.step, steps), share)
    saved_at = clock = time.monotonic()
    bar = tqdm(total=steps, initial=progress.step, desc=desc, unit="step")
    for batch in DataLoader(train, batch_size=None, sampler=batches, num_workers=train.workers):
        batch_size = batches.size(progress.step)
        draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + progress.step)
        pixels = augment(batch["pixel_values"], recipe.shift, recipe.flip, draw, batch_size, share)
        pixels = pixels.to(accelerator.device, memory_format=torch.channels_last)
        labels = batch["labels"].to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, progress.step, steps)

        with accelerator.autocast():
            logits = prepared(pixel_values=pixels).logits
        loss = cross_entropy(logits.float(), labels, reduction="sum")
        # Gradients are averaged over processes, whose shares may differ in size.
        accelerator.backward(loss * world / batch_size)
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
        # Clocks differ between processes: the main process decides for all.
        save = accelerator.is_main_process and now - saved_at > save_seconds
        if accelerator.reduce(torch.tensor(float(save))) > 0:
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


def augment(
    pixels: Tensor, shift: int, flip: bool, generator: torch.Generator, batch_size: int, share: slice
) -> Tensor:
    """Shift images `(n, channels, H, W)` at random by at most `shift` pixels, with their edges repeated, and
    mirror every second one at random.

    They are this process's `share` of a batch. The generator draws for the whole batch, so that an image's
    draw does not depend on the sharding.
    """
    offsets = torch.randint(0, 2 * shift + 1, (2, batch_size, 1), generator=generator)[:, share]
    mirrored = (torch.rand(batch_size, 1, generator=generator) < 0.5)[share] & flip
    n, _, height, width = pixels.shape
    # Index the padded images: the rows and columns that each pixel comes from, `(n, H)` and `(n, W)`.
    rows = torch.arange(height) + offsets[0]
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(mirrored, columns.flip(1), columns) + offsets[1]
    padded = pad(pixels, (shift,) * 4, mode="replicate").permute(0, 2, 3, 1)
    images = torch.arange(n)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def predict(model: PreTrainedModel, images: ImageSet, batch_size: int = 500) -> Tensor:
    """Predict the classes of images in evaluation mode; the model's own mode is kept.

    Returns:
        `Tensor`: `(n,)`, int64 on the CPU, the class with the largest logit.
    """
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    predicted = []
    for batch in images.loader(batch_size):
        logits = model(pixel_values=batch["pixel_values"].to(device)).logits
        predicted.append(logits.argmax(1).cpu())
    model.train(mode)
    return torch.cat(predicted)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Percent of `(n,)` predictions that are right; NaN for none."""
    return 100 * (predicted == labels).double().mean().item()


class Batches:
    """This process's share of the indices of each step's batch.

    An epoch is one permutation of all images; its last batch may be shorter.
    """

    def __init__(self, count: int, recipe: Recipe, steps_per_epoch: int, steps: range, share: slice):
        self.count, self.recipe, self.steps_per_epoch = count, recipe, steps_per_epoch
        self.steps, self.share = steps, share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Tensor]:
        for step in self.steps:
            epoch, index = divmod(step, self.steps_per_epoch)
            if index == 0 or step == self.steps[0]:
                generator = torch.Generator().manual_seed(self.recipe.seed * 7_919 + epoch)
                order = torch.randperm(self.count, generator=generator)
            start = index * self.recipe.batch_size
            yield order[start : start + self.recipe.batch_size][self.share]

    def size(self, step: int) -> int:
        """The size of a step's batch, over all processes."""
        start = step % self.steps_per_epoch * self.recipe.batch_size
        return min(self.recipe.batch_size, self.count - start)


def _end_epoch(
    progress: Progress,
    recipe: Recipe,
    steps_per_epoch: int,
    model: PreTrainedModel,
    validation: ImageSet | None,
) -> None:
    """Add the epoch's row to the log and reset the sums.

    Under several processes the training columns are those of the main process's share.
    """
    rate = learning_rate(recipe, progress.step - 1, recipe.epochs * steps_per_epoch)
    row = {
        "epoch": progress.step // steps_per_epoch,
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "learning_rate": float(f"{rate:.4g}"),
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
    """Write a checkpoint atomically, and only then remove the older ones."""
    draft, checkpoint = output / ".checkpoint.part", output / f"checkpoint-{step}"
    accelerator.save_state(str(draft))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        draft.rename(checkpoint)
        for older in output.glob("checkpoint-*"):
            if older != checkpoint:
                shutil.rmtree(older)
    accelerator.wait_for_everyone()


def _claim(output: Path, model: PreTrainedModel, train: ImageSet, recipe: Recipe) -> None:
    """Record this training's configuration, or check that it matches the one already in `output`."""
    digest = hashlib.sha256(train.rows.numpy().tobytes() + train.labels.numpy().tobytes())
    config = model.config.to_diff_dict()
    config.pop("transformers_version", None)
    here = {
        "model": type(model).__name__,
        "config": config,
        "recipe": asdict(recipe),
        "images": len(train),
        "images_sha256": digest.hexdigest(),
        "image_size": train.image_size,
    }
    here = json.loads(json.dumps(here))
    path = output / "training.json"
    if not path.is_file():
        write_json(path, here)
        return
    there = json.loads(path.read_text("utf-8"))
    for key, value in here.items():
        if value != there.get(key):
            raise BenchmarkError(
                f"{output} holds another training: its {key} is {there.get(key)}, here {value}. "
                "Choose another folder."
            )
