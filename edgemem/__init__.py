"""edgemem runs language models inside a memory budget that you set.

    engine = edgemem.load("model.edgemem")
    print(engine.generate("Once upon a time"))

What does not fit streams from flash, with the answer of a run in which everything fits.
Importing this package loads nothing but this file; what a name needs is imported at its first use.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {"load": ".engine", "Engine": ".engine"}
_ERRORS = (
    "EdgeMemError", "CheckpointError", "ShapeError", "StoreError", "CorruptError", "FlashError",
    "BudgetError", "ContextError", "UnsupportedError",
)  # fmt: skip
_HOMES.update(dict.fromkeys(_ERRORS, ".errors"))

__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
