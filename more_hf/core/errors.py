"""The errors. A message has the fact with its values, the reason if it is not obvious, and a next step."""

from typing import Any


LONGEST = 120  # characters of a value in a message


class MoreError(Exception):
    """Base of all errors of more_hf."""


class SiteNotFoundError(MoreError, ValueError):
    """The model has no layer to edit, or stores it in a form that cannot be edited safely."""


TargetNotFoundError = SiteNotFoundError  # its first name; a target is a concept everywhere else


class PrototypeError(MoreError, ValueError):
    """The prototypes do not allow an exact edit, or a concept was named wrongly."""


class AlreadyErasedError(MoreError, RuntimeError):
    """The model carries an erasure whose original weights are not here."""


class IncompatibleBaseError(MoreError, ValueError):
    """The weights are not the ones that an erasure was made for."""


class ExportError(MoreError, ValueError):
    """Writing the model this way would publish what was erased, or a model that was not erased."""


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
