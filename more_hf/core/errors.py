"""The errors. A message has the fact with its values, the reason if it is not obvious, and a next step."""


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
