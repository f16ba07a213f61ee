"""The lines that every other is compared with (nothing done, a training that never saw D_f), and methods
that train on D_f and D_r themselves, or add noise where the Fisher information allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...splits import ImageSet, Splits
from .head_features import find_head
from .training import Batch, Training, batches, check_finite, entropy, predict, sgd, taking


def original(model: nn.Module, splits: Splits, *, seed: int = 0) -> nn.Module:
    """Return the model as it is, in evaluation mode."""
    return model.eval()


def retrain(
    model: nn.Module, splits: Splits, *, seed: int = 0, fit: Callable[[ImageSet, int], nn.Module]
) -> nn.Module:
    """Return `fit(splits.r, seed)`; the weights of `model` play no part.

    Args:
        fit (`Callable`): the training that made `model`, from the same start with the same recipe, as a
            function of images and seed.
    """
    return fit(splits.r, seed).eval()


@taking(Training, lr=0.01, epochs=10, batch_size=256)
def finetune(model: nn.Module, splits: Splits, training: Training) -> nn.Module:
    """Minimise the cross-entropy of D_r, and trust that D_f is forgotten on the way (Warnecke et al., 2021).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's and l1-sparse's; users needed up to 0.04.
    """
    remain = training.loader(splits.r)
    return training.run(model, lambda epoch: batches(remain, model), partial(entropy, model))


@taking(Training, lr=1e-4, epochs=5, batch_size=256)
def neggrad(model: nn.Module, splits: Splits, training: Training) -> nn.Module:
    """Maximise the cross-entropy of D_f; D_r is not read (Thudi et al., 2022).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's; its maintainers advise up to 1e-3.
    """
    forget = training.loader(splits.f)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return -entropy(model, images, labels)

    return training.run(model, lambda epoch: batches(forget, model), loss)


@taking(Training, lr=0.01, epochs=10, batch_size=256)
def neggrad_plus(model: nn.Module, splits: Splits, training: Training, *, alpha: float = 0.95) -> nn.Module:
    """Minimise α CE(D_r) − (1 − α) CE(D_f), one batch of each in a step, D_f again from the start when it
    ends (Kurmanji et al., 2023).

    Args:
        alpha (`float`), lr (`float`), epochs (`int`): SCRUB's comparison, which uses no weight decay.
    """
    remain, forget = training.loader(splits.r), training.loader(splits.f, 1)

    def steps(epoch: int) -> Iterator[tuple[Batch, Batch]]:
        endless = chain.from_iterable(batches(forget, model) for _ in repeat(None))
        return zip(batches(remain, model), endless, strict=False)

    def loss(remain: Batch, forget: Batch) -> Tensor:
        return alpha * entropy(model, *remain) - (1 - alpha) * entropy(model, *forget)

    return training.run(model, steps, loss, sgd(model.parameters(), training.lr, weight_decay=0))


@taking(Training, lr=0.01, epochs=10, batch_size=256)
def l1_sparse(model: nn.Module, splits: Splits, training: Training, *, alpha: float = 5e-4) -> nn.Module:
    """Minimise CE(D_r) + α (1 − e/E) ‖θ‖₁ in epoch e of E: l1-sparse unlearning (Jia et al., 2023).

    Args:
        alpha (`float`, defaults to 5e-4): of the first epoch; norms and biases are penalised too, as in the
            source.
    """
    remain = training.loader(splits.r)

    def steps(epoch: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        weight = alpha * (1 - epoch / training.epochs)
        return ((images, labels, weight) for images, labels in batches(remain, model))

    def loss(images: Tensor, labels: Tensor, weight: float) -> Tensor:
        norm = sum(parameter.abs().sum() for parameter in model.parameters())
        return entropy(model, images, labels) + weight * norm

    return training.run(model, steps, loss)


@taking(Training, lr=0.01, epochs=10, batch_size=256)
def random_labels(model: nn.Module, splits: Splits, training: Training) -> nn.Module:
    """In each epoch one pass over D_f with random labels, then one over D_r with its own (Golatkar et al.,
    2020; as in SalUn).

    Args:
        lr (`float`), epochs (`int`), batch_size (`int`): SalUn's, which tunes the rate between 0.01 and 0.1.
    """
    return training.run(model, *relabelled(model, splits, training))


Step = tuple[Tensor, Tensor | None]  # images, and their labels unless they are to be drawn


def relabelled(
    model: nn.Module, splits: Splits, training: Training
) -> tuple[Callable[[int], Iterator[Step]], Callable[..., Tensor]]:
    """The steps and the loss of random labels. A label is uniform over all classes, the true one included,
    and drawn anew each time."""
    forget, remain = training.loader(splits.f), training.loader(splits.r, 1)
    generator = torch.Generator().manual_seed(training.seed)

    def steps(epoch: int) -> Iterator[Step]:
        for images, _ in batches(forget, model):
            yield images, None
        yield from batches(remain, model)

    def loss(images: Tensor, labels: Tensor | None) -> Tensor:
        logits = predict(model, images)
        if labels is None:
            labels = torch.randint(logits.shape[1], (len(images),), generator=generator).to(logits.device)
        return cross_entropy(logits, labels)

    return steps, loss


@taking(Training, lr=0.013, epochs=10, batch_size=256)
def salun(model: nn.Module, splits: Splits, training: Training, *, share: float = 0.5) -> nn.Module:
    """Random labels that change only the salient weights: saliency unlearning (Fan et al., 2024).

    The other weights end bit for bit as they were: gradients and momentum are masked, and weight decay is
    undone after each step.

    Args:
        share (`float`, defaults to 0.5): of all weights of the model, ranked together, that may change.
        lr (`float`), epochs (`int`), batch_size (`int`): the source's example.
    """
    masks = salient(model, splits, share, training.batch_size)
    steps, loss = relabelled(model, splits, training)
    parameters = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = sgd(model.parameters(), training.lr)

    def mask_gradients() -> None:
        for name, parameter in parameters.items():
            parameter.grad.mul_(masks[name])

    @torch.no_grad()
    def put_back() -> None:
        for name, parameter in parameters.items():
            parameter.copy_(torch.where(masks[name], parameter, before[name]))
            optimizer.state[parameter]["momentum_buffer"].mul_(masks[name])

    return training.run(model, steps, loss, optimizer, before_step=mask_gradients, after_step=put_back)


def salient(model: nn.Module, splits: Splits, share: float, batch_size: int) -> dict[str, Tensor]:
    """A boolean mask for each parameter: the `share` of all entries with the largest |Σ ∇CE(D_f)|, in
    evaluation mode."""
    model.eval().zero_grad(set_to_none=True)
    with torch.enable_grad():
        for images, labels in batches(splits.f.loader(batch_size), model):
            entropy(model, images, labels).backward()  # adds up over the batches
    sizes = {name: parameter.grad.abs() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    # All entries are ranked together, as one vector, which is then cut into the parameters again.
    flat = torch.cat([size.flatten() for size in sizes.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(round(share * len(flat))).indices] = True
    parts = chosen.split([size.numel() for size in sizes.values()])
    return {name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def fisher(
    model: nn.Module,
    splits: Splits,
    *,
    seed: int = 0,
    alpha: float = 1e-7,
    limit: float = 1e3,
    samples: int = 1000,
) -> nn.Module:
    """Add N(0, α min(1/F, limit)) to each weight, F the diagonal Fisher information of D_r (Golatkar et al.,
    2020).

    As in SCRUB's port: `limit` is ten times lower and α ten times higher in the head, α ten times higher for
    norms and biases, and the head's rows of classes that only D_f has become N(0, 1e-4). Not as there: F is
    over single samples, not batches of 32, and its expectation over labels is one draw from the model's own
    distribution per sample.

    Args:
        alpha (`float`, defaults to 1e-7): SCRUB uses 1e-6 to 1e-7.
        samples (`int`, defaults to 1000): of D_r, drawn at random, that F is estimated on, one backward pass
            each.
    """
    generator = torch.Generator().manual_seed(seed)
    information = fisher_information(model, splits.r, samples, generator)
    head_name, head = find_head(model, splits.f)
    classes = splits.f.labels.unique().tolist()
    only_forgotten = [c for c in classes if not (splits.r.labels == c).any()]

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of_head = name.startswith(f"{head_name}.")
            highest = limit / 10 if of_head else limit
            variance = alpha * (1 / (information[name] + 1e-8)).clamp_max(highest)
            scale = 10.0 if of_head or parameter.ndim == 1 else 1.0
            parameter.add_(normal(parameter) * (scale * variance).sqrt())
        for parameter in head.parameters():
            for row in only_forgotten:
                parameter[row] = 1e-2 * normal(parameter[row])
    check_finite(model, "fisher")
    return model


def fisher_information(
    model: nn.Module, images: ImageSet, samples: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """For each parameter, the mean over samples of (∂ log p(y|x))², y drawn from the model itself; in
    evaluation mode."""
    model.eval()
    rows = torch.randperm(len(images), generator=generator)[:samples]
    information = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    with torch.enable_grad():
        for pixels, _ in batches((images[row] for row in rows.split(1)), model):
            logits = predict(model, pixels)
            probabilities = logits.detach().softmax(-1).cpu()
            label = torch.multinomial(probabilities, 1, generator=generator)[0].to(logits.device)
            model.zero_grad(set_to_none=True)
            cross_entropy(logits, label).backward()
            for name, parameter in model.named_parameters():
                information[name] += parameter.grad.square() / len(rows)
    model.zero_grad(set_to_none=True)
    return information
