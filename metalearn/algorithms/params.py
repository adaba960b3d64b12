"""Name prefixes in flat dictionaries of tensors: "net." for the backbone, "head." for a head."""

from metalearn.tasks.types import Params


def select(params: Params, prefix: str) -> Params:
    """Return the entries that start with `prefix.`, without the prefix."""
    return {
        name[len(prefix) + 1 :]: value
        for name, value in params.items()
        if name.startswith(f"{prefix}.")
    }


def prefixed(params: Params, prefix: str) -> Params:
    """Return the same entries, with `prefix.` before each name."""
    return {f"{prefix}.{name}": value for name, value in params.items()}
