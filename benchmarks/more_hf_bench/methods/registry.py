"""All methods of the benchmarks in the order of their tables, the search for a method by name, and a method
of the user's own: its source is one of its settings, and what it returns is checked.

Importing this module imports neither torch nor diffusers; `Method.load` imports the method's own module.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from ..errors import BenchmarkError
from ..run import SOURCE


@dataclass(frozen=True)
class Method:
    """One method of a benchmark."""

    # `"module:function"` as `pkgutil.resolve_name` takes it; a leading dot means a module beside this one
    place: str
    # `"main"` for the main table, `"control"` for a line of it that cannot win, `"appendix"` for a variant of
    # a method of the main table
    role: Literal["main", "control", "appendix"] = "main"
    trained: bool = False  # whether it takes gradient steps. The other methods are training-free.
    # what a benchmark of pictures passes as `remap_to`: `"none"`, the `"one"` target, or `"several"` targets
    targets: Literal["none", "one", "several"] = "one"
    # whether a benchmark of classes may give it the features of the head in place of the images: one pass
    # over the data is all it needs
    closed_form: bool = False
    # what a benchmark of classes can let it forget: `"classes"`, `"samples"` or `"both"`
    forgets: Literal["classes", "samples", "both"] = "both"

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        return resolve_name(__package__ + self.place if self.place.startswith(".") else self.place)


UNREGISTERED = Method("")
"""The facts of a method that is in no registry: `DIFFUSION.get(name, UNREGISTERED).targets`."""

_ERASE = "more_hf.diffusion.erase:erase_concept"

DIFFUSION: dict[str, Method] = {
    "original": Method(".diffusion.inference:original", role="control"),
    "random-weights": Method(".diffusion.inference:random_weights", role="control"),
    "noise": Method(".diffusion.inference:noise", role="control"),
    "negative_prompt": Method(".diffusion.inference:negative_prompt", role="control"),
    "more": Method(_ERASE),
    "more-reloaded": Method(".diffusion.ours:more_reloaded"),
    "more-erase": Method(_ERASE, targets="none"),
    "more-mean": Method(_ERASE, targets="several"),
    "more-random": Method(".diffusion.ours:more_random", targets="several"),
    "more-hash": Method(".diffusion.ours:more_hash", targets="several"),
    "more-paper": Method(".diffusion.ours:more_paper"),
    "more-without-po": Method(".diffusion.ours:more_without_po"),
    "more-erase-without-po": Method(".diffusion.ours:more_without_po", targets="none"),
    "uce": Method(".diffusion.closed_form:uce"),
    "rece": Method(".diffusion.closed_form:rece"),
    "cure": Method(".diffusion.closed_form:cure"),
    "speed": Method(".diffusion.closed_form:speed"),
    "oce": Method(".diffusion.closed_form:oce"),
    "sld-medium": Method(".diffusion.inference:sld_medium"),
    "safree": Method(".diffusion.safree:safree"),
    "esd": Method(".diffusion.esd:esd", trained=True),
    "ca": Method(".diffusion.ca:ca", trained=True),
    "more-denoiser": Method(".diffusion.ours:more_denoiser", role="appendix"),
    "more-denoiser-soft": Method(".diffusion.ours:more_denoiser_soft", role="appendix"),
    "more-denoiser-hard": Method(".diffusion.ours:more_denoiser_hard", role="appendix"),
    "more-denoiser-rece": Method(".diffusion.ours:more_denoiser_rece", role="appendix"),
    "more-gates": Method(".diffusion.ours:more_gates", role="appendix"),
    "more-gates-soft": Method(".diffusion.ours:more_gates_soft", role="appendix"),
    "midsteer": Method(".diffusion.midsteer:midsteer", role="appendix"),
    "care": Method(".diffusion.care:care", role="appendix"),
    "tea": Method(".diffusion.tea:tea", role="appendix", trained=True),
    "more-described": Method(".diffusion.ours:more_described", role="appendix"),
    "more-pinv": Method(".diffusion.ours:more_pinv", role="appendix"),
    "more-covariance": Method(".diffusion.ours:more_covariance", role="appendix"),
    "more-without-po-covariance": Method(".diffusion.ours:more_without_po_covariance", role="appendix"),
    "uce-paper": Method(".diffusion.closed_form:uce_paper", role="appendix"),
    "sld-weak": Method(".diffusion.inference:sld_weak", role="appendix"),
    "sld-strong": Method(".diffusion.inference:sld_strong", role="appendix"),
    "sld-max": Method(".diffusion.inference:sld_max", role="appendix"),
    "safree-re-attention": Method(".diffusion.safree:safree_re_attention", role="appendix"),
    "esd-repo": Method(".diffusion.esd:esd_repo", role="appendix", trained=True),
}
"""Methods for pipelines, called as `more_hf_bench.methods.diffusion` says; ours are `more*`."""

_OF_CLASSES = {"closed_form": True, "forgets": "classes"}
_OF_SAMPLES = {"closed_form": True, "forgets": "samples"}
_ABLATION = {"role": "appendix", "forgets": "classes"}

CLASSIFICATION: dict[str, Method] = {
    "original": Method(".classification.gradients:original", role="control"),
    "retrain": Method(".classification.gradients:retrain", trained=True),
    "finetune": Method(".classification.gradients:finetune", trained=True),
    "neggrad": Method(".classification.gradients:neggrad", trained=True),
    "neggrad-plus": Method(".classification.gradients:neggrad_plus", trained=True),
    "random-labels": Method(".classification.gradients:random_labels", trained=True),
    "salun": Method(".classification.gradients:salun", trained=True),
    "l1-sparse": Method(".classification.gradients:l1_sparse", trained=True),
    "fisher": Method(".classification.gradients:fisher"),
    "boundary-shrink": Method(".classification.teachers:boundary_shrink", trained=True),
    "scrub": Method(".classification.teachers:scrub", trained=True),
    "bad-teacher": Method(".classification.teachers:bad_teacher", trained=True),
    "lau": Method(".classification.teachers:lau", trained=True),
    "esc": Method(".classification.subspaces:esc", closed_form=True),
    "esc-as-released": Method(".classification.subspaces:esc_as_released"),
    "esc-t": Method(".classification.subspaces:esc_t", trained=True),
    "esc-t-as-released": Method(".classification.subspaces:esc_t_as_released", trained=True),
    "pour": Method(".classification.subspaces:pour", **_OF_CLASSES),
    "kodge": Method(".classification.layers:kodge", forgets="classes"),
    "leace-rest": Method(".classification.subspaces:leace_rest", **_OF_CLASSES),
    "leace-target": Method(".classification.subspaces:leace_target", **_OF_CLASSES),
    "erase-without-po": Method(".classification.ours:erase_without_po", **_OF_CLASSES),
    "remap-without-po": Method(".classification.ours:remap_without_po", **_OF_CLASSES),
    "erase-without-complement": Method(".classification.ours:erase_without_complement", **_ABLATION),
    "remap-without-complement": Method(".classification.ours:remap_without_complement", **_ABLATION),
    "erase": Method(".classification.ours:erase", **_OF_CLASSES),
    "remap": Method(".classification.ours:remap", **_OF_CLASSES),
    "more": Method(".classification.ours:more", **_OF_CLASSES),
    "more-hash": Method(".classification.ours:more_hash", **_OF_CLASSES),
    "more-paper": Method(".classification.ours:more_paper", **_OF_CLASSES),
    "more-prototype": Method(".classification.ours:more_prototype", forgets="classes"),
    "more-trained": Method(".classification.ours:more_trained", trained=True, **_ABLATION),
    "more-inner": Method(".classification.ours:more_inner", **_ABLATION),
    "remap-samples": Method(".classification.ours:remap_samples", **_OF_SAMPLES),
    "remap-samples-as-printed": Method(".classification.ours:remap_samples_as_printed", **_OF_SAMPLES),
}
"""Methods for classifiers, called as `more_hf_bench.methods.classification` says."""


def diffusion_groups() -> dict[str, list[str]]:
    """Words that mean several methods of `DIFFUSION` at once."""
    main = {name: method for name, method in DIFFUSION.items() if method.role != "appendix"}
    return {
        "all": list(main),
        "training-free": [name for name, method in main.items() if not method.trained],
        "appendix": [name for name in DIFFUSION if name not in main],
    }


def classification_groups(forgets: Literal["classes", "samples"]) -> dict[str, list[str]]:
    """Words that mean several methods of `CLASSIFICATION` at once, for forgetting classes or samples."""
    methods = methods_that_forget(forgets)
    return {
        "closed-form": [name for name, m in methods.items() if m.role == "control" or m.closed_form],
        "all": [name for name, m in methods.items() if m.role != "appendix"],
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
    if ":" not in name:
        close = difflib.get_close_matches(name, methods, n=3)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise BenchmarkError(
            f"There is no method {name!r} {kind}.{meant} There are: {', '.join(methods)}. "
            "Choose one of them, or name a function of your own as my_module:my_erase."
        )
    # A console script, unlike `python -m`, does not look for modules in the working directory.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = resolve_name(name)
        inspect.signature(function).bind(None, None, **dict.fromkeys(keywords))
    except (ImportError, AttributeError, ValueError) as error:
        raise BenchmarkError(
            f"{name} cannot be imported: {error}. Name a function as my_module:my_erase, and start the "
            "command in the folder of my_module.py or install the package that it belongs to."
        ) from error
    except TypeError as error:
        raise BenchmarkError(
            f"{name} does not take the arguments of a method {kind}: {error}. "
            f"Give it two positional parameters and the keywords {', '.join(keywords)}."
        ) from error
    return own_method(name, function)


logger = logging.getLogger(__name__)


def own_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """
    A function of the user's own as a method of the benchmarks.

    Its additional setting `source` makes results of another source results of another configuration. All
    components of a pipeline that it gets are its own, so that whatever it changes, the original stays.

    Raises:
        `TypeError`: from the method, if what it returns is not what it was given one of.
    """

    @wraps(function)
    def method(model: Any, forgotten: Any, *, source: str = "", **arguments: Any) -> Any:
        parts = {"": model}
        if is_pipeline(model):
            parts = {key: part for key, part in model.components.items() if hasattr(part, "parameters")}
            parts = copy.deepcopy(parts)
            model.register_modules(**parts)
        before = _totals(parts)
        result = function(model, forgotten, **arguments)
        if not callable(result) or is_pipeline(result) != is_pipeline(model):
            raise TypeError(
                f"{name} returned {type(result).__name__}, not {type(model).__name__}. "
                "Let it return the model that it was given."
            )
        if result is model and _totals(parts) == before:
            logger.warning(
                "%s changed no weight of the model that it was given. If it is meant to, look whether it "
                "changes a copy.",
                name,
            )
        return result

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    last = len(parameters) - (parameters[-1].kind is Parameter.VAR_KEYWORD)
    parameters.insert(last, Parameter(SOURCE, Parameter.KEYWORD_ONLY, default=_source_of(name)))
    method.__signature__ = signature.replace(parameters=parameters)
    return method


def is_pipeline(model: Any) -> bool:
    """Whether it is a pipeline rather than a classifier."""
    return hasattr(model, "register_modules")


def _totals(parts: Mapping[str, Any]) -> list[float]:
    """The sum of each weight's magnitudes, which tells whether one was changed."""
    return [
        float(weight.detach().double().abs().sum()) for part in parts.values() for weight in part.parameters()
    ]


def _source_of(name: str) -> str:
    """A hash of the module of `"module:function"` and of the modules beside it."""
    # by name, since a decorated function may say that it is from the decorator's file
    file = sys.modules[name.partition(":")[0]].__file__
    digest = hashlib.sha256()
    for path in sorted(Path(file).parent.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
