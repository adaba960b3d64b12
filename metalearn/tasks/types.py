"""Define the central types. In a batch of tasks, every tensor has a leading T (tasks)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
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
    """The support set of a task.

    Attributes:
        x: Inputs [M, *X]; images and features float32, tokens int64.
        y: Class within the task, int64 [M], or targets, float32 [M, D].
        way: Number of classes, or D for regression. Static, so that it is known under `vmap`.
        unlabelled: Inputs without labels [U, *X], or None.
    """

    x: Tensor
    y: Tensor
    way: int = dataclasses.field(metadata={"static": True})
    unlabelled: Tensor | None = None


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
    """An ordinary batch.

    Attributes:
        x: Inputs [B, *X]; with V views of each example [B V, *X], those of one are adjacent.
        y: Labels over all training classes, int64 [B], or targets, float32 [B, D].
        key: int64 [].
    """

    x: Tensor
    y: Tensor
    key: Tensor


class State(NamedTuple):
    """All tensors of a method. Checkpoint files call the two fields `meta` and `fixed`.

    Attributes:
        params: Tensors with meta-gradients.
        buffers: Tensors without, such as population statistics and optimiser moments.
    """

    params: Params
    buffers: Params


class InputSpec(NamedTuple):
    """The inputs of a dataset.

    Attributes:
        shape: Shape of one input, without the batch axis.
        vocabulary: Number of different tokens; None for other inputs.
    """

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

    Attributes:
        input_shape: Shape of one input.
        way: Number of classes per task, or of target dimensions.
        train_classes: Number of training classes, 0 for regression.
        target: "class", "value" or another target of a family.
        vocabulary: See `InputSpec`.
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
    """The result of `Algorithm.loss`.

    Attributes:
        value: The loss []; its gradient is the meta-gradient.
        logs: Scalars to log, including "loss"; and perhaps `CLASS_ERRORS`.
        statistics: Normalisation statistics of this pass, by name in `State.buffers`. Those buffers
            follow them as a moving average.
        buffers: New values of other buffers, by name; they replace the old ones.
    """

    value: Tensor
    logs: Params
    statistics: Params
    buffers: Params = {}  # noqa: RUF012


class OwnLayers(Protocol):
    """Layers on images [B, C, H, W] that are fast under `vmap` with weights per task."""

    def convolution(self, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """Convolve x with weight [O, C, K, K], K odd, padding K // 2."""

    def block(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        stride: int,
        eps: float,
        slope: float,
    ) -> Tensor:
        """Convolve, normalise by the statistics of the batch, and activate (leaky ReLU)."""


class Kernels(NamedTuple):
    """Implementations of the same mathematics; the engine chooses the faster ones.

    Attributes:
        convolution: "plain", which becomes a grouped convolution under `vmap` with per-task
            weights; "unfold", patches times weights, which becomes a batched matrix product; or
            "direct", the engine's own operators.
        fused_norm: Scale and shift inside `F.batch_norm`. Faster, but with a wrong second
            derivative under `vmap` with per-task weights.
        own: The engine's operators, for "direct".
        pooled: The engine's operator of a block with pooling, for "direct" if no second derivative
            is taken: (x, weight, scale, shift, eps, slope) to (output, mean, variance).
    """

    convolution: str = "plain"
    fused_norm: bool = False
    own: OwnLayers | None = None
    pooled: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over episodes with the half-width of its 95% confidence interval."""

    mean: float
    ci95: float
    episodes: int
