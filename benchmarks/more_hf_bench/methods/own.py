"""A method of the user's own: its source is one of its settings, and a failure says which method failed."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Any

from ..errors import BenchmarkError
from ..run import SOURCE


logger = logging.getLogger(__name__)


class MethodError(BenchmarkError):
    """A method of the user's own raised, or did not return a model."""


def own_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """
    A function of the user's own as a method of the benchmarks.

    Its additional setting `source` makes results of another source results of another configuration. All
    components of a pipeline that it gets are its own, so that whatever it changes, the original stays.
    """

    @wraps(function)
    def method(model: Any, forgotten: Any, *, source: str = "", **arguments: Any) -> Any:
        if hasattr(model, "register_modules"):
            parts = {key: part for key, part in model.components.items() if hasattr(part, "parameters")}
            model.register_modules(**copy.deepcopy(parts))
        try:
            result = function(model, forgotten, **arguments)
        except Exception as error:
            raised = f"{name} raised {type(error).__name__}: {error}"
            raise MethodError(f"{raised}. Mend it and run again.") from error
        if not callable(result):
            raise MethodError(f"{name} returned {result!r}, not a model. Let it return the one it was given.")
        return result

    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    last = len(parameters) - (parameters[-1].kind is Parameter.VAR_KEYWORD)
    parameters.insert(last, Parameter(SOURCE, Parameter.KEYWORD_ONLY, default=_source_of(function)))
    method.__signature__ = signature.replace(parameters=parameters)
    return method


def _source_of(function: Callable[..., Any]) -> str:
    """A hash of the function's module and of the modules beside it."""
    digest = hashlib.sha256()
    for path in sorted(Path(inspect.getfile(function)).parent.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class Failures:
    """The failures of methods in a run, which goes on without them."""

    def __init__(self) -> None:
        self.failed: dict[str, None] = {}  # an ordered set

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Inside the block, a method that fails is reported with its traceback, and left out."""
        try:
            yield
        except MethodError as error:
            logger.error("%s is left out. %s", what, error, exc_info=error.__cause__)
            self.failed[what] = None

    def raise_any(self) -> None:
        """Raises `MethodError` if there were any: after everything else was done."""
        if self.failed:
            raise MethodError(
                f"{', '.join(self.failed)} failed, as said above; everything else is measured. Mend it and "
                "run the same command again."
            )
