"""The errors. A message states the fact with its values, the reason if not obvious, and the next step."""

from typing import Any


LONGEST = 120  # characters of a value in a message


class MoreError(Exception):
    """Base of all errors of more_hf."""

    exit_status = 2  # of the command line


class SiteNotFoundError(MoreError, ValueError):
    """The model has no layer to edit, or stores it in a form that cannot be edited safely."""


class PrototypeError(MoreError, ValueError):
    """No exact edit exists for the prototypes, or an argument is wrong."""


class AlreadyErasedError(MoreError, RuntimeError):
    """The model carries an erasure whose original weights are not available."""


class IncompatibleBaseError(MoreError, ValueError):
    """The weights are not the ones that an erasure was made for."""


class ExportError(MoreError, ValueError):
    """Writing the model this way would publish what was erased, or a model that was not erased."""


def shown(value: Any) -> str:
    """A value's repr for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
