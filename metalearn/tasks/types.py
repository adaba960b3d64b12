"""Define the central types. In a batch of tasks, every tensor has a leading T (tasks)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]


def _pytree_dataclass(cls: type) -> type:
    """Register a frozen dataclass as a pytree whose children exclude static and None fields."""
    fields = dataclasses.fields(cls)

    # `vmap` rejects None leaves.
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
    """The support set of a task."""

    x: Tensor  # inputs [M, *X]; images and features float32, tokens int64
    y: Tensor  # class within the task, int64 [M], or targets, float32 [M, D]
    #: Number of classes, or D for regression. Static, so that it is known under `vmap`.
    way: int = dataclasses.field(metadata={"static": True})
    unlabelled: Tensor | None = None  # inputs without labels [U, *X], or None


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Query:
    """The query set of a task: x [Q, *X] and y as in `Support`."""

    x: Tensor
    y: Tensor


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One task; key int64 [] is the source of all its random numbers."""

    support: Support
    query: Query
    key: Tensor


@_pytree_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """An ordinary batch: labels are over all training classes."""

    x: Tensor  # inputs [B, *X]; with V views of each example [B V, *X], those of one are adjacent
    y: Tensor  # labels int64 [B], or targets, float32 [B, D]
    key: Tensor  # int64 []


class State(NamedTuple):
    """All tensors of a method. Checkpoint files call the two fields `meta` and `fixed`.

    Parameters have meta-gradients; buffers, such as population statistics, have none.
    """

    params: Params
    buffers: Params


class InputSpec(NamedTuple):
    """Shape of an input of a dataset, and the number of different tokens; None for other inputs."""

    shape: tuple[int, ...]
    vocabulary: int | None = None

    @property
    def kind(self) -> str:
        """Return "images", "tokens" or "features"."""
        if self.vocabulary is not None:
            return "tokens"
        return "images" if len(self.shape) == 3 else "features"


class Tokenizer(Protocol):
    """Converts texts to tokens, the same for training and prediction."""

    @property
    def vocabulary(self) -> int:
        """Number of different tokens; 0 is padding."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return tokens, int64 [I, L], padded with 0 on the right to the longest text."""


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the initialisation of a method depends on.

    `way` is the number of classes per task, or of target dimensions; `train_classes` is 0 for
    regression.
    """

    input_shape: tuple[int, ...]
    way: int
    train_classes: int
    target: str
    vocabulary: int | None = None

    @property
    def inputs(self) -> InputSpec:
        """Return the part that a backbone needs."""
        return InputSpec(self.input_shape, self.vocabulary)


#: Name in `Loss.logs` of the number of wrong predictions and of queries of each class [2, N], which
#: training with `episode.train.sampler=hard` needs.
CLASS_ERRORS = "class_errors"


class Loss(NamedTuple):
    """The result of `Algorithm.loss`."""

    value: Tensor  # the loss []; its gradient is the meta-gradient
    logs: Params  # scalars to log, including "loss"; and perhaps `CLASS_ERRORS`
    #: Normalisation statistics of this pass, by name in `State.buffers`. Those buffers follow them
    #: as a moving average.
    statistics: Params
    #: New values of other buffers, by name; they replace the old ones.
    buffers: Params = {}  # noqa: RUF012


class Kernels(NamedTuple):
    """Implementations of the same mathematics; the engine chooses the faster ones."""

    #: "plain", which becomes a grouped convolution under `vmap` with per-task weights; "unfold",
    #: patches times weights, which becomes a batched matrix product; or "direct", the engine's own
    #: operators.
    convolution: str = "plain"
    #: Scale and shift inside `F.batch_norm`. Faster, but with a wrong second derivative under
    #: `vmap` with per-task weights.
    fused_norm: bool = False
    own: Any = None  # the engine's operators (the module `metalearn.engine.kernels`), for "direct"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95% confidence interval."""

    mean: float
    ci95: float
    episodes: int
