"""The proof by run of a pipeline: only the edited layers read the prompt, each with its edited weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.erasure import Erasure
from ..core.errors import SiteNotFoundError
from ..core.facts import is_text
from ..core.interrupts import afterwards, unwound
from ..core.proof import TRIED_EXPERTS, Measurements, probes
from ..core.remap import Remap
from ..core.site import Site
from ..core.views import experts_forced, routing_off, running_eagerly
from .hook import arguments_of, at_place
from .sites import Denoiser


LENGTH = 4  # tokens of a text

Text = dict[str, Tensor]  # space -> features of a batch


def prover(
    denoiser: Denoiser, erasure: Erasure, current: Erasure | None
) -> Callable[[Mapping[str, Tensor]], dict[str, float]]:
    """
    Prove now, before a weight is changed, that nothing but the layers to be edited reads the prompt; and
    return a function that proves, on the edited model, that each of them computes with its edited weight.

    The returned function takes the edited weights and returns `other_ways` and `spread` (see
    `prove_no_other_way`), and the measurements of `Measurements.require_edited`.

    Raises:
        `SiteNotFoundError`: something else reads the prompt.
    """
    features = {space: remap.prototypes.matrix for space, remap in _text_remaps(erasure).items()}
    with nullcontext() if current is None else routing_off(current):
        # where nothing has a name, no layer that reads text is edited
        ways = prove_no_other_way(denoiser, features) if features else {}
    return lambda edited: {**ways, **_prove_layers(denoiser, erasure, edited)}


@torch.no_grad()
def prove_no_other_way(denoiser: Denoiser, features: Text) -> dict[str, float]:
    """
    Run the denoiser on one text and keep what each layer that reads text answers. Run it on another text,
    each of these layers answering as before. If nothing else reads the prompt, the two outputs are the same
    bit for bit, whatever the precision. The edit plays no part in it, and the denoiser is not changed.

    A GPU may sum up in another order each time. There the first text runs twice, and the difference between
    the texts must not exceed the spread between the two runs. On the CPU the spread is zero.

    The features are examples `(d, n)` of each space that is edited, for their number and size. Returns
    `other_ways`, the largest difference between the outputs, and its `spread`.

    Raises:
        `SiteNotFoundError`: the outputs differ; the message names the first layer whose output moved.
    """
    ways, spreads = [], []
    with _plain(denoiser):
        for component, module in denoiser.parts.items():
            found = denoiser.family.find(module)
            layers = {name: reader.module for name, reader in found.items() if reader.space in features}
            texts = [_random_text(features, seed) for seed in (0, 1)]
            run = partial(_run_replayed, denoiser, module, layers)
            answers: dict[str, list[Tensor]] = {name: [] for name in layers}
            with _answers_recorded(layers, answers):
                first = denoiser.family.call(module, texts[0])
            if not first.isfinite().all():
                raise SiteNotFoundError(
                    f"`{component}` gives NaN or infinity in {first.dtype} for a text of ordinary size, so "
                    "nothing can be proved by running it. Load it in a wider dtype. Nothing was changed."
                )
            # The CPU sums in a fixed order, so a second run would give the same bits.
            again = first if first.device.type == "cpu" else run(texts[0], answers)
            other = run(texts[1], answers)
            ways.append(float((first - other).abs().max()))
            spreads.append(float((first - again).abs().max()))
            # written so that a NaN fails
            if not ways[-1] <= spreads[-1]:
                moved = _first_moved(module, [partial(run, text, answers) for text in texts])
                raise SiteNotFoundError(
                    f"The proof by run failed: the prompt reaches `{component}` by other ways than the "
                    f"{len(layers)} layers to be edited. With each of these answering as before, another "
                    f"prompt moved the output by {ways[-1]:.2g}; the first layer whose output moved is "
                    f"`{moved}`. Nothing was changed. Remove custom attention processors "
                    "(`set_default_attn_processor()`) and adapters, erase, and put them back."
                )
    return {"other_ways": max(ways), "spread": max(spreads)}


def _random_text(features: Text, seed: int) -> Text:
    """Random features as long as the examples `(d, n)`: tokens `(1, LENGTH, d)`, pooled `(1, d)`."""
    generator = torch.Generator().manual_seed(seed)
    text = {}
    for space, examples in features.items():
        positions = () if space == "pooled" else (LENGTH,)
        # as long as real features, so that half precision rounds as in use
        noise = torch.randn(1, *positions, len(examples), generator=generator)
        text[space] = noise * float(examples.square().mean().sqrt())
    return text


@contextmanager
def _answers_recorded(layers: Mapping[str, nn.Module], answers: Mapping[str, list[Tensor]]) -> Iterator[None]:
    """Inside the block, what each layer answers is added to its list."""

    def keep(name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        answers[name].append(output.clone())  # the model may go on in place

    with _hooked(layers, keep):
        yield


def _run_replayed(
    denoiser: Denoiser,
    module: nn.Module,
    layers: Mapping[str, nn.Module],
    text: Text,
    answers: Mapping[str, list[Tensor]],
) -> Tensor:
    """The output for a text, each layer answering from its list."""
    left = {name: iter(outputs) for name, outputs in answers.items()}

    def replay(name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # a layer that answered fewer times in the first run answers by itself
        return next(left[name], output).clone()

    with _hooked(layers, replay):
        return denoiser.family.call(module, text)


def _first_moved(module: nn.Module, runs: list[Callable[[], Tensor]]) -> str:
    """The first layer whose output differs between two runs."""
    leaves = {name: layer for name, layer in module.named_modules() if not list(layer.children())}
    calls: list[list[tuple[str, Tensor]]] = []

    def keep(name: str, layer: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor):
            calls[-1].append((name, output))

    for run in runs:
        calls.append([])
        with _hooked(leaves, keep):
            run()
    # Up to the first difference, both runs call the same layers in the same order.
    for (name, output), (_, other) in zip(*calls, strict=False):
        if not torch.equal(output, other):
            return name
    return "the last one"


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], act: Callable[..., Tensor | None]) -> Iterator[None]:
    """Inside the block, `act` is a forward hook of each layer, with the layer's name in front."""
    with unwound() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(act, name)).remove)
        yield


@torch.no_grad()
def prove_weights(
    denoiser: Denoiser, sites: Mapping[str, Site], rows: Text, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """
    Run the denoiser once, and inside that pass ask each site whether it computes with the given weight.

    `rows` are what a site of each space is asked, `(n, d)`.

    Raises:
        `SiteNotFoundError`: see `Measurements.require_edited`.
    """
    measured = Measurements()

    def ask(site: Site, like: Tensor) -> None:
        weight = weights[site.name]
        measured.ask_layer(site, rows[site.space], weight, weight, like)

    text = _random_text({space: examples.T for space, examples in rows.items()}, seed=0)
    with _plain(denoiser), _asked_inside(sites, ask):
        for module in denoiser.parts.values():
            denoiser.family.call(module, text)
    return measured.require_edited(sites)


@contextmanager
def _asked_inside(sites: Mapping[str, Site], ask: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Inside the block, `ask` is called once a site, when it is first called, with what it read."""
    asked: set[str] = set()

    def once(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if name not in asked:  # to ask is to call it again
            asked.add(name)
            ask(sites[name], args[0])

    with _hooked({name: site.module for name, site in sites.items()}, once):
        yield


@torch.no_grad()
def _prove_layers(denoiser: Denoiser, erasure: Erasure, edited: Mapping[str, Tensor]) -> dict[str, float]:
    """
    Run the edited denoiser once. Inside that pass, ask each edited layer for what its edit reads and keeps,
    and compare what the routing hooks hand on for up to eight experts.

    Raises:
        `SiteNotFoundError`: see `Measurements.require_edited`.
    """
    measured = Measurements()
    rows = {space: probes(remap) for space, remap in erasure.remaps.items()}

    def ask(site: Site, like: Tensor) -> None:
        weights = edited[site.name], erasure.originals[site.name]
        rewrite = erasure.rewrites.get(site.name)
        asked = rows[site.space] if rewrite is None else rewrite.asked
        measured.ask_layer(site, asked, *weights, like)

    remaps = _text_remaps(erasure)
    experts = range(min(erasure.remap.num_experts, TRIED_EXPERTS)) if erasure.hooks else [None]
    # A row for each expert, with the prototypes that it forgets behind one that stays.
    text = {}
    for space, remap in remaps.items():
        forgotten = remap.prototypes.matrix[:, list(remap.forget)].T
        stays = remap.prototypes.matrix[:, 0]
        row = forgotten[:1] if space == "pooled" else torch.cat([stays[None], forgotten])[None]
        text[space] = row.repeat(len(experts), *[1] * (row.ndim - 1))
    if not remaps:
        readers = denoiser.find().values()
        widths = {each.space: each.columns or each.module.in_features for each in readers}
        text = _random_text({space: torch.ones(width, 1) for space, width in widths.items()}, seed=0)
    forced = experts_forced(erasure, torch.tensor(experts)) if erasure.hooks else nullcontext()
    with _plain(denoiser), forced, _asked_inside(erasure.sites, ask):
        for component, module in denoiser.parts.items():
            with _features_heard(denoiser, component, text if erasure.hooks else {}) as heard:
                denoiser.family.call(module, text)
            for space, routed in heard.items():
                for i, expert in enumerate(experts):
                    name = f"expert {expert} of {space} in `{component}`"
                    z = text[space][i].to(routed.dtype)
                    measured.compare_routed(name, routed[i][: len(z)], z, remaps[space], expert)
    return measured.require_edited(erasure.sites)


@contextmanager
def _features_heard(denoiser: Denoiser, component: str, text: Text) -> Iterator[Text]:
    """
    Inside the block, the mapping receives the features of each space as they are behind the routing hooks.

    A norm in front of the edited layer outputs the given text, since no input of it would give a prototype.
    """
    heard: Text = {}
    module = denoiser.parts[component]

    def keep_arguments(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = {**dict(zip(arguments_of(module), args, strict=False)), **kwargs}
        for space, place in denoiser.routed_places.items():
            if space in text:
                heard[space] = at_place(given, place)

    def replace_output(space: str, norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
        z = text[space]
        samples = output.reshape(len(z), -1, output.shape[-1]).clone()  # may be joined and padded
        samples[:, : z.shape[1]] = z.to(samples)
        return samples.reshape(output.shape)

    def keep_output(space: str, norm: nn.Module, args: tuple, output: Tensor) -> None:
        z = text[space]
        heard[space] = output.reshape(len(z), -1, output.shape[-1])[:, : z.shape[1]]

    with unwound() as hooks:
        if text and denoiser.family.norms:
            for space, name in denoiser.family.norms.items():
                norm = module.get_submodule(name)
                first = norm.register_forward_hook(partial(replace_output, space), prepend=True)
                hooks.callback(first.remove)
                hooks.callback(norm.register_forward_hook(partial(keep_output, space)).remove)
        elif text:
            hooks.callback(module.register_forward_pre_hook(keep_arguments, with_kwargs=True).remove)
        yield heard


def _text_remaps(erasure: Erasure) -> dict[str, Remap]:
    """The remaps of the spaces that come from the prompt."""
    return {space: remap for space, remap in erasure.remaps.items() if is_text(space)}


@contextmanager
def _plain(denoiser: Denoiser) -> Iterator[None]:
    """Inside the block: no dropout, and no compilation, since the proof's shapes would make it recompile."""
    training = [module for module in denoiser.module.modules() if module.training]

    def undo() -> None:
        for module in training:
            module.training = True

    with afterwards(undo), running_eagerly():
        denoiser.module.eval()
        yield
