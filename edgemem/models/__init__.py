"""Models by name: a model is the file named by its `model_type`, with a class `Model`."""

import importlib
import pkgutil

from ..errors import UnsupportedError

_PARTS = ("decoder", "layers", "rope", "workspace")


def supported() -> list[str]:
    """The model types that can run."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name not in _PARTS)


def build(store, streamer, core, max_tokens: int, predict: bool = False):
    """The model of an open store; `predict`: which neurons are active is foretold. Raises
    UnsupportedError if no file here is its model type."""
    model_type = store.spec.model_type
    if model_type not in supported():
        raise UnsupportedError(
            f"building a model: {model_type!r} is none of {', '.join(supported())}"
        )
    module = importlib.import_module(f".{model_type}", __name__)
    return module.Model(store, streamer, core, max_tokens, predict)
