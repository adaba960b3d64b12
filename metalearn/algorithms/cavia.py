"""CAVIA: adapt only a few context parameters, which scale and shift the features of the network."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from metalearn.algorithms.gradient import MetaGradient
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.base import Backbone
from metalearn.config.fields import at_least
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, State, Support


@dataclasses.dataclass(frozen=True)
class _Modulated:
    """A backbone whose parameters include a scale and shift "film.…" for each normalisation."""

    backbone: Backbone

    def embed(self, params: Params, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Params]:
        options["film"] = select(params, "film") or None
        return self.backbone.embed(params, x, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CAVIA(MetaGradient):
    """Gradient descent on context parameters phi; all other weights theta are only meta-learned.

    phi_0 = 0, phi_k+1 = phi_k - inner_lr * grad_phi L_support(theta, phi_k) (Zintgraf et al. 2019,
    section 3). Each channel c of the layer after a normalisation is x (1 + s_c) + t_c, where
    (s, t) = W phi is linear in phi and W belongs to theta, as in their convolutional network.

    Departures: every layer is modulated, also of fully connected networks (theirs: the third
    convolution; elsewhere phi is a further input of the first layer), and phi = 0 is the unmodified
    network (theirs: a bias of s and t is learned, and 1 is not added). Both make phi_0 = 0 a
    network that can be pretrained.
    """

    num_context: int = at_least(1)

    @property
    def network(self) -> Backbone:
        return _Modulated(self.backbone)  # type: ignore[return-value]

    def init(self, spec: Spec, key: Tensor) -> State:
        """Add W of each scale and shift, as "context.<name>" [C, num_context], with variance 1 / C.

        So a step of phi moves each of them about as much as a step along its own gradient would.
        """
        state = super().init(spec, key)
        film = self.backbone.film(spec.inputs, key.device)
        if not film:
            raise UserError(
                f"backbone={type(self.backbone).__name__}: has no layer that CAVIA can modulate; "
                "choose another backbone"
            )
        weights = {
            name: prng.normal(prng.fold_in(key, 100 + number), (len(zero), self.num_context))
            * len(zero) ** -0.5
            for number, (name, zero) in enumerate(film.items())
        }
        return State(state.params | prefixed(weights, "context"), state.buffers)

    def adapts(self, name: str) -> bool:
        """Return True for phi alone."""
        return name == "phi"

    def trajectory(self, state: State, support: Support, key: Tensor, steps: int) -> list[Params]:
        phi = torch.zeros_like(state.params["head.bias"][:1]).expand(self.num_context)
        return super().trajectory(
            state._replace(params=state.params | {"phi": phi}), support, key, steps
        )

    def at_step(self, params: Params, step: int) -> Params:
        """Return the weights with the scales and shifts [C] that belong to phi [num_context]."""
        context = select(params, "context")
        film = {name: weight @ params["phi"] for name, weight in context.items()}
        return params | prefixed(film, "net.film")
