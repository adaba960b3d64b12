"""CAVIA: adapt only a few context parameters, which scale and shift the features of the network.

Zintgraf, Shiarlis, Kurin, Hofmann and Whiteson (2019), "Fast context adaptation via meta-learning".
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from metalearn.algorithms.linear_head import Adapted, LinearHeadAlgorithm
from metalearn.algorithms.normalisation import Normalisation
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.base import Backbone
from metalearn.config.fields import above, at_least
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
class CAVIA(LinearHeadAlgorithm):
    """Gradient descent on context parameters phi; all other weights theta are only meta-learned.

    phi_0 = 0, phi_k+1 = phi_k - inner_lr * grad_phi L_support(theta, phi_k) (Zintgraf et al. 2019,
    section 3). Each channel c of the layer after a normalisation is x (1 + s_c) + t_c, where
    (s, t) = W phi is linear in phi and W belongs to theta, as in their convolutional network.

    Departures: every layer is modulated, also of fully connected networks (theirs: the third
    convolution; elsewhere phi is a further input of the first layer), and phi = 0 is the unmodified
    network (theirs: a bias of s and t is learned, and 1 is not added). Both make phi_0 = 0 a
    network that can be pretrained.

    Attributes:
        num_context: Number of context parameters.
        inner_steps: Number of steps in meta-training.
        test_inner_steps: Number of steps in testing.
        step_lrs: Learning rates of the first inner steps; the last one is used for all later steps.
            If empty, all steps use inner_lr.
        first_order: If true, drop the derivative of the inner gradient.
    """

    num_context: int = at_least(1)
    inner_lr: float = above(0)
    step_lrs: list[float] = above(0, default=[])
    inner_steps: int = at_least(0, in_testing="test_inner_steps")
    test_inner_steps: int = at_least(0)
    first_order: bool

    @property
    def training_steps(self) -> int:
        return self.inner_steps

    @property
    def normalisation(self) -> Normalisation:
        normalisation = super().normalisation
        return dataclasses.replace(normalisation, backbone=_Modulated(normalisation.backbone))  # type: ignore[arg-type]

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

    def embed(self, params: Params, x: Tensor, given: Params) -> Tensor:
        return _Modulated(self.backbone).embed(select(params, "net"), x, given or None)[0]

    def adapt(
        self, state: State, support: Support, *, key: Tensor, steps: int | None = None
    ) -> Adapted:
        rates, given = self.step_lrs or [self.inner_lr], self.given(state)

        def support_loss(phi: Tensor, theta: Params, key: Tensor) -> Tensor:
            return self.support_loss(modulated(theta, phi), support, given, key)

        phi = torch.zeros_like(state.params["head.bias"][:1]).expand(self.num_context)
        for step in range(self.test_inner_steps if steps is None else steps):
            point = (phi, state.params)
            if self.first_order:
                point = (phi.detach(), {name: one.detach() for name, one in point[1].items()})
            gradient = grad(support_loss)(*point, prng.fold_in(key, step))
            phi = phi - rates[min(step, len(rates) - 1)] * gradient
        return self.adapted(modulated(state.params, phi), support.x)


def modulated(params: Params, phi: Tensor) -> Params:
    """Return the weights with the scales and shifts [C] that belong to phi [num_context]."""
    film = {name: weight @ phi for name, weight in select(params, "context").items()}
    return params | prefixed(film, "net.film")
