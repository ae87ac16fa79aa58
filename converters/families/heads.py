"""Heads whose size no config says."""

from edgemem.errors import CheckpointError, UnsupportedError


def head_size(hidden: int, heads: int) -> int:
    """Raises CheckpointError where heads do not divide the hidden size, UnsupportedError where they
    are of an odd one."""
    if hidden % heads:
        raise CheckpointError(f"config.json: {heads} heads do not divide hidden_size = {hidden}")
    if hidden // heads % 2:
        raise UnsupportedError(
            f"config.json: {heads} heads of {hidden // heads} numbers each are not supported; "
            "supported are heads of an even size"
        )
    return hidden // heads
