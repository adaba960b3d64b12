"""Central types. When tasks are batched, every tensor gets a leading T (tasks)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]


def _pytree_dataclass(cls: type) -> type:
    """Register a frozen dataclass as a pytree; fields declared static, and fields that are None, are not children.

    A None must not be a leaf because `vmap` refuses it.
    """
    fields = dataclasses.fields(cls)

    def flatten(node: Any) -> tuple[list[Any], Any]:
        children, static = [], []
        for field in fields:
            value = getattr(node, field.name)
            if value is None or "static" in field.metadata:
                static.append((field.name, value))
            else:
                children.append(value)
        return children, tuple(static)

    def unflatten(children: Any, static: Any) -> Any:
        fixed, dynamic = dict(static), iter(children)
        return cls(**{f.name: fixed[f.name] if f.name in fixed else next(dynamic) for f in fields})

    pytree.register_pytree_node(
        cls, flatten, unflatten, serialized_type_name=f"metalearn.{cls.__name__}"
    )
    return cls


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Support:
    """The examples that a task is learned from.

    x: [M, *X] inputs (images and features float32, tokens int64).
    y: [M] int64, the class within the task, or [M, D] float32 targets.
    way: number of classes of the task, or D for regression; static, so that it is known under `vmap`.
    unlabelled: [U, *X] more inputs without labels, or None.
    """

    x: Tensor
    y: Tensor
    way: int = dataclasses.field(metadata={"static": True})
    unlabelled: Tensor | None = None


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """The examples that a task is tested on: x [Q, *X] and y as in `Support`."""

    x: Tensor
    y: Tensor


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One task. key: int64 [], the source of all its random numbers."""

    support: Support
    query: Query
    key: Tensor


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """An ordinary batch: x [B, *X], y [B] with labels over all training classes (or [B, D]), key int64 []."""

    x: Tensor
    y: Tensor
    key: Tensor


class State(NamedTuple):
    """All tensors of a method: `params` get meta-gradients; `buffers` do not (population statistics, optimiser moments).

    Checkpoint files call them `meta` and `fixed`.
    """

    params: Params
    buffers: Params


class InputSpec(NamedTuple):
    """The inputs of a dataset.

    shape: of one input, without the batch axis; vocabulary: number of different tokens, None where inputs are not tokens.
    """

    shape: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def kind(self) -> str:
        """Return "images", "tokens" or "features"."""
        if self.vocabulary is not None:
            return "tokens"
        return "images" if len(self.shape) == 3 else "features"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known before any weight exists.

    input_shape: of one input; way: outputs of a classifier of one task (or target dimensions); train_classes: number of
    training classes (0 for regression); target: "class", "value" or a family's own; vocabulary: see `InputSpec`.
    """

    input_shape: tuple[int, ...]
    way: int
    train_classes: int
    target: str
    vocabulary: int | None = None

    @property
    def inputs(self) -> InputSpec:
        """The part that a backbone needs."""
        return InputSpec(self.input_shape, self.vocabulary)


class Loss(NamedTuple):
    """What `Algorithm.loss` returns.

    value: [], its gradient is the meta-gradient; logs: scalars to record, among them "loss"; statistics: normalisation
    statistics of this pass, by their names in `State.buffers`, which follow them as a moving average; buffers: new values
    of other buffers, by name, which are replaced by them.
    """

    value: Tensor
    logs: Params
    statistics: Params
    buffers: Params = {}  # noqa: RUF012


class Kernels(NamedTuple):
    """How the same mathematics is computed; the engine chooses by what is fast where.

    convolution: "plain", which becomes a grouped convolution under `vmap` with per-task weights; or "unfold", patches
    times weights, which becomes a batched matrix product. fused_norm: scale and shift inside `F.batch_norm`, which is
    faster but has a wrong second derivative under `vmap` with per-task weights.
    """

    convolution: str = "plain"
    fused_norm: bool = False


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95% interval."""

    mean: float
    ci95: float
    episodes: int
