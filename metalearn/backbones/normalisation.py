"""Batch normalisation as a function of explicit statistics; the only place that normalises."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.tasks.types import Kernels, Params


def init(name: str, features: int, device: torch.device) -> tuple[Params, Params]:
    """Return weight 1 and bias 0, and population statistics of mean 0 and variance 1."""
    one, zero = torch.ones(features, device=device), torch.zeros(features, device=device)
    return (
        {f"{name}.weight": one, f"{name}.bias": zero},
        {f"{name}.mean": zero.clone(), f"{name}.var": one.clone()},
    )


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """All normalisations in one forward pass: call it with a layer's name and its input."""

    params: Params  # parameters of the network; a layer without `<name>.weight` is not normalised
    #: Statistics to use; None to use those of each input (biased variance).
    given: Params | None = None
    #: Whether to store the statistics of each input, differentiable, in `seen`.
    collect: bool = False
    eps: float = 1e-5  # added to variances
    kernels: Kernels = Kernels()  # selects the implementation
    #: `<name>.scale` and `<name>.shift` [C] of a task, or None. After each layer's normalisation: x
    #: (1 + scale) + shift (Perez et al. 2018).
    film: Params | None = None
    #: Collected statistics, {"<name>.mean": [C], "<name>.var": [C]}.
    seen: Params = dataclasses.field(default_factory=dict)
    #: Number of channels C of each layer called so far.
    features: dict[str, int] = dataclasses.field(default_factory=dict)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Normalise x [B, C, ...] per channel (Ioffe and Szegedy 2015)."""
        self.features[name] = x.shape[1]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        if f"{name}.weight" in self.params:
            x = self._normalise(name, x, shape)
        if self.film is not None:
            scale, shift = self.film[f"{name}.scale"], self.film[f"{name}.shift"]
            x = x * (1 + scale.view(shape)) + shift.view(shape)
        return x

    def of_batch(self, name: str, features: int) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift [C] if the named layer is batch normalisation and no more.

        None if it does not normalise, uses given statistics, collects them or has a `film`.
        """
        plain = self.given is None and not self.collect and self.film is None
        if not plain or f"{name}.weight" not in self.params:
            return None
        self.features[name] = features
        return self.params[f"{name}.weight"], self.params[f"{name}.bias"]

    def _normalise(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        if self.collect:
            axes = [axis for axis in range(x.dim()) if axis != 1]
            var, mean = torch.var_mean(
                x.to(torch.promote_types(x.dtype, torch.float32)), axes, correction=0
            )
            self.seen.update({f"{name}.mean": mean, f"{name}.var": var})
        if self.given is None:
            if self.kernels.fused_norm:
                return _fused(x, weight, bias, self.eps)
            # The affine part is outside: under vmap, the second derivative of F.batch_norm is wrong
            # when its weight differs between tasks (torch 2.15; tests/test_backbones.py).
            standard = F.batch_norm(x, None, None, training=True, eps=self.eps)
            return standard * weight.view(shape) + bias.view(shape)
        # F.batch_norm treats given statistics as constants, but gradients must pass through them.
        scale = weight * torch.rsqrt(self.given[f"{name}.var"] + self.eps)
        shift = bias - self.given[f"{name}.mean"] * scale
        return x * scale.view(shape) + shift.view(shape)


def _fused(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise x [B, C, ...] by its statistics, for a single task."""
    if x.device.type != "cpu":
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    # For images in channels-last, the statistics of F.batch_norm on CPU (torch 2.15) are running
    # sums in float32, whose errors add up if many values are equal, as in a background.
    shape = (1, -1) + (1,) * (x.dim() - 2)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    values = x.detach()
    mean = values.mean(axes, dtype=torch.promote_types(x.dtype, torch.float32))
    deviations = values - mean.view(shape)
    var = deviations.mul_(deviations).mean(axes)
    y: Tensor = _BatchNorm.apply(x, weight, bias, mean, var, eps)
    return y


class _BatchNorm(torch.autograd.Function):
    """F.batch_norm by statistics of x that are given, but not as constants: a function of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, mean, var, ctx.eps = inputs
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + ctx.eps))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, inverse = ctx.saved_tensors
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        return *gradients, None, None, None
