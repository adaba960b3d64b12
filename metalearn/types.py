"""The central types. A leading T (tasks) is added everywhere when tasks are batched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]


def _pytree_dataclass(cls: type) -> type:
    """Makes a frozen dataclass a pytree: its fields are children, but for those declared static.

    A field that is None is static too, so that an absent tensor is no leaf `vmap` would stumble over.
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

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"metalearn.{cls.__name__}")
    return cls


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Labelled:
    """Inputs with their targets.

    x: [M, *X] float32; y: [M] int64, the class index within the task, or [M, D] float32 targets.
    way: number of classes of the task (static), or of target dimensions for regression.
    """

    x: Tensor
    y: Tensor
    way: int = dataclasses.field(metadata={"static": True})


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One task: what may be learned from, what is asked, and the key of its random numbers.

    unlabelled: [U, *X] or None; key: int64 [].
    """

    support: Labelled
    query: Labelled
    key: Tensor
    unlabelled: Tensor | None = None


class State(NamedTuple):
    """All tensors of a method: `meta` gets gradients, `fixed` does not (population statistics, and what a method keeps besides)."""

    meta: Params
    fixed: Params


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is known before any weight exists.

    input_shape: of one input, without the batch axis; way: outputs a classifier of one task needs (or target
    dimensions); train_classes: number of training classes (0 for regression); target: "class" or "value".
    """

    input_shape: tuple[int, ...]
    way: int
    train_classes: int
    target: str


class Loss(NamedTuple):
    """What `Algorithm.loss` returns.

    value: [] the objective whose gradient is the meta-gradient; logs: scalars to record, "loss" among them;
    statistics: normalisation statistics of this pass, by their names in `State.fixed`.
    """

    value: Tensor
    logs: Params
    statistics: Params


class Kernels(NamedTuple):
    """How the same mathematics is computed; the engine chooses by what is fast where.

    convolution: "plain", which with weights of each task's own becomes a grouped one under `vmap`; or "unfold", patches
    times weights, which becomes a batched matrix product. fused_norm: scale and shift inside `F.batch_norm`, which is
    faster but wrong in second derivatives under `vmap` with weights of each task's own.
    """

    convolution: str = "plain"
    fused_norm: bool = False


class Backbone(Protocol):
    """A function x -> embedding that knows nothing of classes.

    Where it has a field `kernels`, the engine sets it. Where it has a field `frozen` that is true, no gradient reaches its
    parameters and its population statistics stay what they are at first.
    """

    def init(self, input_shape: tuple[int, ...], key: Tensor) -> tuple[Params, Params]:
        """Parameters and initial population statistics, both on the key's device."""

    def shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """What one embedding is when it is not flattened: (C, H, W) of a map, or (D,)."""

    def embed(
        self, params: Params, x: Tensor, given: Params | None = None, collect: bool = False, key: Tensor | None = None
    ) -> tuple[Tensor, Params]:
        """x [B, *X] -> z [B, D] and, if `collect`, the normalisation statistics of this batch.

        Args: given: the statistics to use, None for those of the batch; key: int64 [], of the noise that a backbone may have
          while meta-training (dropout, DropBlock); None: no noise.
        """


@dataclasses.dataclass(frozen=True)
class Score:
    """How predictions of a kind of task are scored, and which way is better."""

    name: str
    higher_is_better: bool
    of: Callable[[Tensor, Tensor], Tensor]

    def better(self, new: float, old: float | None) -> bool:
        return old is None or (new > old if self.higher_is_better else new < old)


def _accuracy(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction.argmax(-1) == y).to(torch.float32).mean(-1)


def _squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    return (prediction - y).square().mean((-2, -1))


#: Score of a task by its kind of target; predictions [..., Q, N], targets [..., Q] or [..., Q, N] -> [...].
SCORES = {"class": Score("accuracy", True, _accuracy), "value": Score("mse", False, _squared_error)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95% interval."""

    mean: float
    ci95: float
    episodes: int
