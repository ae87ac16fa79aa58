"""Every error that edgemem raises on purpose.

A message says what was being done, to what, and what to try. The caller's own mistakes (a negative
count, a wrong type) are ValueError or TypeError instead, raised before any work starts.
"""


class EdgeMemError(Exception):
    """Base of all errors of edgemem; the CLI turns it into one line and exit code 1."""


class CheckpointError(EdgeMemError):
    """A checkpoint (someone else's weights) cannot be read or converted as it is."""


class ShapeError(EdgeMemError):
    """An array or a tensor has a shape that does not fit where it is used."""


class StoreError(EdgeMemError):
    """A store cannot be opened, read or written."""


class CorruptError(StoreError):
    """A store's bytes are not the bytes that were written: truncated, flipped or foreign."""


class FlashError(EdgeMemError):
    """The device or file system failed to deliver bytes that should be there."""


class BudgetError(EdgeMemError):
    """The memory budget is below the floor; the message carries the sum line by line."""


class ContextError(EdgeMemError):
    """A session's context has no room for the tokens asked of it."""


class UnsupportedError(EdgeMemError):
    """Something well-formed that this version cannot do: it is named, with what is supported."""
