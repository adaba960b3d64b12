"""Low-rank adaptation: the inner loop adapts W + BA for each weight W of the backbone."""

import dataclasses
import math
import re
from typing import Any

import torch
from torch import Tensor

from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.algorithms.params import select
from metalearn.backbones.base import Backbone
from metalearn.config.fields import above, at_least, setting
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State


@dataclasses.dataclass(frozen=True)
class _Open:
    """A backbone that is differentiated also if it is frozen; its frozen weights are constants."""

    backbone: Backbone

    def embed(self, params: Params, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Params]:
        frozen: dict[str, Any] = {"frozen": False} if self.backbone.is_frozen else {}
        backbone: Backbone = dataclasses.replace(self.backbone, **frozen)
        return backbone.embed(params, x, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(GradientAdaptation):
    """MAML whose inner loop adapts the head, and a low-rank change of each weight of the backbone.

    W' = W + scale * B A, with A [rank, I] and B [O, rank] for a weight W [O, I], or a filter
    [O, I, K, K] as a matrix [O, I K K] (Hu et al. 2022, eq. 3; their scale is alpha / rank). A
    starts normal with variance 1 / I and B at 0, so the change starts at 0. W, A and B are
    meta-learned; a frozen backbone's W stays. Departure: A and B are the initialisation of gradient
    descent on few examples, so they are meta-learned (theirs: trained once on a large dataset).

    A weight is changed if the regular expression `layers` occurs in its name.
    """

    rank: int = at_least(1)
    scale: float = above(0)
    layers: str = setting()

    def __post_init__(self) -> None:
        try:
            re.compile(self.layers)
        except re.error as error:
            raise UserError(
                f"algo.layers={self.layers}: should be a regular expression ({error})"
            ) from None

    def init(self, spec: Spec, key: Tensor) -> State:
        """Add "lora.<name>.down" A and "lora.<name>.up" B; raise UserError if no weight matches."""
        state = super().init(spec, key)
        factors: Params = {}
        for number, (name, weight) in enumerate(select(state.params, "net").items()):
            if weight.dim() < 2 or not re.search(self.layers, name):
                continue
            inputs = weight[0].numel()
            noise = prng.normal(prng.fold_in(key, 100 + number), (self.rank, inputs))
            factors[f"lora.{name}.down"] = noise / math.sqrt(inputs)
            factors[f"lora.{name}.up"] = torch.zeros(len(weight), self.rank, device=key.device)
        if not factors:
            names = [name for name in state.params if state.params[name].dim() > 1]
            raise UserError(
                f"algo.layers={self.layers}: matches no weight of the backbone; there are "
                f"{', '.join(name[4:] for name in names[:4])}, …"
            )
        return State(state.params | factors, state.buffers)

    def adapts(self, name: str) -> bool:
        """Return True for the head, the factors, and with `adapt_normalisation` its weights."""
        if name.startswith("net.") and not name.startswith("net.norm"):
            return False
        return super().adapts(re.sub(r"^lora\.", "net.", name))

    @property
    def network(self) -> Backbone:
        return _Open(self.backbone)  # type: ignore[return-value]

    def at_step(self, params: Params, step: int) -> Params:
        """Return the weights plus B A; no gradient reaches those of a frozen backbone."""
        params = dict(params)
        for name in [name for name in params if name.startswith("net.")]:
            if self.backbone.is_frozen and not self.adapts(name):
                params[name] = params[name].detach()
            up, down = (params.get(f"lora.{name[4:]}.{part}") for part in ("up", "down"))
            if up is not None and down is not None:
                params[name] = params[name] + self.scale * (up @ down).view_as(params[name])
        return params
