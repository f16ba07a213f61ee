"""A method of the user's own: its source is one of its settings, and what it returns is checked."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Any

from ..run import SOURCE


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
