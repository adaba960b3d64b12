"""Flat dictionaries of tensors whose names start with a prefix: "net.…" of the backbone, "head.…" of a head."""

from metalearn.tasks.types import Params


def select(params: Params, prefix: str) -> Params:
    """Return the entries under `prefix.`, without it."""
    return {
        name[len(prefix) + 1 :]: value
        for name, value in params.items()
        if name.startswith(f"{prefix}.")
    }


def prefixed(params: Params, prefix: str) -> Params:
    """Return the same entries under `prefix.`."""
    return {f"{prefix}.{name}": value for name, value in params.items()}
