"""Name prefixes in flat dictionaries of tensors: "net." for the backbone, "head." for a head."""

import torch
from torch import Tensor

from metalearn.tasks.types import Params


def select(params: Params, prefix: str) -> Params:
    """Return the entries that start with `prefix.`, without the prefix."""
    start = f"{prefix}."
    return {name.removeprefix(start): x for name, x in params.items() if name.startswith(start)}


def prefixed(params: Params, prefix: str) -> Params:
    """Return the same entries, with `prefix.` before each name."""
    return {f"{prefix}.{name}": value for name, value in params.items()}


def dot(a: Params, b: Params) -> Tensor:
    """Compute the inner product [] of two dictionaries with the names of `a`."""
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()
