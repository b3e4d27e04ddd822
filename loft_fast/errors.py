"""The package's own errors: every refusal of bad input is one of these.

Each message names the argument, what was got and what was expected, and the call that raised it has changed nothing.
"""


class LoftError(Exception):
    """Base of everything this package raises on purpose."""


class InputError(LoftError, ValueError):
    """An argument has a wrong value, shape or type."""


class SiteError(LoftError, LookupError):
    """A site cannot be found in the model, or does not carry float features."""


class FoldError(LoftError, TypeError):
    """The module at the site cannot absorb a projection."""


class FileFormatError(LoftError, ValueError):
    """A file is truncated, foreign, or of a schema this version does not read."""


class StoreError(LoftError):
    """A store is missing, busy, damaged, of a newer schema, or does not agree with what is checked against it."""


class DistributedError(LoftError, RuntimeError):
    """Another process failed, or did not answer in time."""


class FederatedError(LoftError, RuntimeError):
    """A round is incomplete, or a client did not answer, or not as it should."""


class MissingExtraError(LoftError, ImportError):
    """An optional dependency is needed; the message names the extra that installs it."""
