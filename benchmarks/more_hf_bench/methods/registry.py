"""All methods of the benchmarks, one line each, and the search for a method by name.

Importing this module imports neither torch nor diffusers; `Method.load` imports the method's own module.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from ..errors import BenchmarkError


@dataclass(frozen=True)
class Method:
    """One method of a benchmark.

    Attributes:
        name (`str`): what the command line and the tables call it.
        place (`str`): `"module:function"`; a leading dot means a module of this package.
        role (`str`): `"main"` for the main table, `"control"` for a line of it that cannot win, `"appendix"`
            for a variant of a method of the main table.
        trained (`bool`): whether it takes gradient steps. The other methods are training-free.
        targets (`str`): what a benchmark of pictures passes as `remap_to`: `"none"`, the `"one"` target, or
            `"several"` targets.
        closed_form (`bool`): whether a benchmark of classes may give it the features of the head in place of
            the images: one pass over the data is all it needs.
        forgets (`str`): what a benchmark of classes can let it forget: `"classes"`, `"samples"` or `"both"`.
    """

    name: str
    place: str
    role: Literal["main", "control", "appendix"] = "main"
    trained: bool = False
    targets: Literal["none", "one", "several"] = "one"
    closed_form: bool = False
    forgets: Literal["classes", "samples", "both"] = "both"

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, function = self.place.split(":")
        return getattr(import_module(module, __package__), function)


UNREGISTERED = Method("", "")
"""The facts of a method that is in no registry: `DIFFUSION.get(name, UNREGISTERED).targets`."""

_OURS = "more_hf.diffusion.erase:erase_concept"

_DIFFUSION = (
    Method("original", ".diffusion.controls:original", role="control"),
    Method("noise", ".diffusion.controls:noise", role="control"),
    Method("negative_prompt", ".diffusion.controls:negative_prompt", role="control"),
    Method("more", _OURS),
    Method("more-reloaded", ".diffusion.ours:more_reloaded"),
    Method("more-erase", _OURS, targets="none"),
    Method("more-mean", _OURS, targets="several"),
    Method("more-random", ".diffusion.ours:more_random", targets="several"),
    Method("more-hash", ".diffusion.ours:more_hash", targets="several"),
    Method("more-without-po", ".diffusion.without_po:more_without_po"),
    Method("more-erase-without-po", ".diffusion.without_po:more_without_po", targets="none"),
    Method("uce", ".diffusion.uce:uce"),
    Method("rece", ".diffusion.rece:rece"),
    Method("cure", ".diffusion.cure:cure"),
    Method("speed", ".diffusion.speed:speed"),
    Method("oce", ".diffusion.oce:oce"),
    Method("sld-medium", ".diffusion.sld:sld_medium"),
    Method("safree", ".diffusion.safree:safree"),
    Method("esd", ".diffusion.esd:esd", trained=True),
    Method("ca", ".diffusion.ca:ca", trained=True),
    Method("more-denoiser", ".diffusion.ours:more_denoiser", role="appendix"),
    Method("more-denoiser-soft", ".diffusion.ours:more_denoiser_soft", role="appendix"),
    Method("more-denoiser-hard", ".diffusion.ours:more_denoiser_hard", role="appendix"),
    Method("more-described", ".diffusion.ours:more_described", role="appendix"),
    Method("uce-paper", ".diffusion.uce:uce_paper", role="appendix"),
    Method("sld-weak", ".diffusion.sld:sld_weak", role="appendix"),
    Method("sld-strong", ".diffusion.sld:sld_strong", role="appendix"),
    Method("sld-max", ".diffusion.sld:sld_max", role="appendix"),
    Method("safree-re-attention", ".diffusion.safree:safree_re_attention", role="appendix"),
    Method("esd-repo", ".diffusion.esd:esd_repo", role="appendix", trained=True),
)

DIFFUSION: dict[str, Method] = {method.name: method for method in _DIFFUSION}
"""Methods for pipelines, `method(pipe, concepts, *, remap_to, retain, **settings) -> pipe`, in the order of
the tables. A method may edit the denoiser, which is a copy of its own; ours are `more*`."""

_CLASSIFICATION = (
    Method("original", ".classification.original:original", role="control"),
    Method("retrain", ".classification.retrain:retrain", trained=True),
    Method("finetune", ".classification.finetune:finetune", trained=True),
    Method("neggrad", ".classification.neggrad:neggrad", trained=True),
    Method("neggrad-plus", ".classification.neggrad_plus:neggrad_plus", trained=True),
    Method("random-labels", ".classification.random_labels:random_labels", trained=True),
    Method("salun", ".classification.salun:salun", trained=True),
    Method("l1-sparse", ".classification.l1_sparse:l1_sparse", trained=True),
    Method("fisher", ".classification.fisher:fisher"),
    Method("boundary-shrink", ".classification.boundary_shrink:boundary_shrink", trained=True),
    Method("scrub", ".classification.scrub:scrub", trained=True),
    Method("bad-teacher", ".classification.bad_teacher:bad_teacher", trained=True),
    Method("lau", ".classification.lau:lau", trained=True),
    Method("esc", ".classification.esc:esc", closed_form=True),
    Method("esc-as-released", ".classification.esc:esc_as_released"),
    Method("esc-t", ".classification.esc_t:esc_t", trained=True),
    Method("esc-t-as-released", ".classification.esc_t:esc_t_as_released", trained=True),
    Method("leace-rest", ".classification.leace:leace_rest", closed_form=True, forgets="classes"),
    Method("leace-target", ".classification.leace:leace_target", closed_form=True, forgets="classes"),
    Method(
        "erase-without-po", ".classification.without_po:erase_without_po", closed_form=True, forgets="classes"
    ),
    Method(
        "remap-without-po", ".classification.without_po:remap_without_po", closed_form=True, forgets="classes"
    ),
    Method(
        "erase-without-complement",
        ".classification.without_complement:erase_without_complement",
        role="appendix",
        forgets="classes",
    ),
    Method(
        "remap-without-complement",
        ".classification.without_complement:remap_without_complement",
        role="appendix",
        forgets="classes",
    ),
    Method("erase", ".classification.ours:erase", closed_form=True, forgets="classes"),
    Method("remap", ".classification.ours:remap", closed_form=True, forgets="classes"),
    Method("more", ".classification.ours:more", closed_form=True, forgets="classes"),
    Method("more-hash", ".classification.ours:more_hash", closed_form=True, forgets="classes"),
    Method("more-prototype", ".classification.ours:more_prototype", forgets="classes"),
    Method(
        "more-trained", ".classification.ours:more_trained", role="appendix", trained=True, forgets="classes"
    ),
    Method("more-inner", ".classification.ours:more_inner", role="appendix", forgets="classes"),
    Method("remap-samples", ".classification.ours:remap_samples", closed_form=True, forgets="samples"),
    Method(
        "remap-samples-as-printed",
        ".classification.ours:remap_samples_as_printed",
        closed_form=True,
        forgets="samples",
    ),
)

CLASSIFICATION: dict[str, Method] = {method.name: method for method in _CLASSIFICATION}
"""Methods for classifiers, `method(model, splits, *, seed=0, **settings) -> model`, in the order of the
tables. A method may edit the model, which is a copy of its own, and returns it in evaluation mode. It reads
`f` and `r` of `splits`, a `more_hf_bench.splits.Splits`. Its settings have the defaults of its source."""


def diffusion_groups() -> dict[str, list[str]]:
    """Words that mean several methods of `DIFFUSION` at once."""
    methods = DIFFUSION.values()
    return {
        "all": [m.name for m in methods if m.role != "appendix"],
        "training-free": [m.name for m in methods if m.role != "appendix" and not m.trained],
        "appendix": [m.name for m in methods if m.role == "appendix"],
    }


def classification_groups(forgets: Literal["classes", "samples"]) -> dict[str, list[str]]:
    """Words that mean several methods of `CLASSIFICATION` at once, for forgetting classes or samples."""
    methods = methods_that_forget(forgets).values()
    return {
        "closed-form": [m.name for m in methods if m.role == "control" or m.closed_form],
        "all": [m.name for m in methods if m.role != "appendix"],
    }


def methods_that_forget(what: Literal["classes", "samples"]) -> dict[str, Method]:
    """The entries of `CLASSIFICATION` that can forget whole classes, or single samples."""
    return {name: method for name, method in CLASSIFICATION.items() if method.forgets in (what, "both")}


def find_diffusion_method(name: str) -> Callable[..., Any]:
    """Return the function of a method of `DIFFUSION`, or one's own by its place.

    Args:
        name (`str`): a name of `DIFFUSION`; or `"my_module:my_erase"`, a function in a module that is
            installed or in the working directory.

    Raises:
        `BenchmarkError`: if there is no such method, module or function, or if the function takes other
            arguments.
    """
    return _find(name, DIFFUSION, "for pipelines", keywords=("remap_to", "retain"))


def find_classification_method(name: str, *, forgets: Literal["classes", "samples"]) -> Callable[..., Any]:
    """Return the function of a method that forgets classes or samples, or one's own by its place.

    Arguments and errors as of `find_diffusion_method`.
    """
    return _find(name, methods_that_forget(forgets), f"that forgets {forgets}", keywords=("seed",))


def _find(name: str, methods: Mapping[str, Method], kind: str, keywords: Sequence[str]) -> Callable[..., Any]:
    """Look a name up in `methods`, or import it; a benchmark passes two arguments and these keywords."""
    if name in methods:
        return methods[name].load()
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise BenchmarkError(
            f"There is no method {name!r} {kind}.{_did_you_mean(name, methods)} There are: "
            f"{', '.join(methods)}. Choose one of them, or name a function of your own as my_module:my_erase."
        )
    function = _own_function(module_name, function_name)
    try:
        inspect.signature(function).bind(None, None, **dict.fromkeys(keywords))
    except TypeError as error:
        raise BenchmarkError(
            f"{name} does not take the arguments of a method {kind}: {error}. "
            f"Give it two positional parameters and the keywords {', '.join(keywords)}."
        ) from error
    return function


def _own_function(module_name: str, function_name: str) -> Callable[..., Any]:
    # A console script, unlike `python -m`, does not look for modules in the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise BenchmarkError(
            f"The module {module_name} cannot be imported: {error}. "
            f"Start the command in the folder of {module_name}.py, or install the package that it belongs to."
        ) from error
    functions = {name: value for name, value in vars(module).items() if callable(value)}
    if function_name not in functions:
        raise BenchmarkError(
            f"{module_name} has no function {function_name!r}.{_did_you_mean(function_name, functions)} "
            f"Write my_module:my_erase, with a function that {module.__file__} defines."
        )
    return functions[function_name]


def _did_you_mean(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
