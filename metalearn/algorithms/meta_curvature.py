"""Meta-Curvature: MAML with learned matrices that transform the inner gradients."""

import dataclasses

import torch
from torch import Tensor

from metalearn.algorithms.gradient import GradientAdaptation
from metalearn.tasks.types import Params, Spec, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaCurvature(GradientAdaptation):
    """MAML with a meta-learned curvature: theta_k+1 = theta_k - inner_lr * MC(grad L_support).

    MC(G) = G x_1 M_o x_2 M_i x_3 M_f for the gradient [O, I, F] of a weight, with M_o [O, O] over
    outputs, M_i [I, I] over inputs and, for convolutions, M_f [F, F] over filter positions (Park
    and Oliva 2019, variant MC2). x_n is the product with mode n. A vector [O] has a factor for each
    entry. All start as the identity, which is MAML.
    """

    def init(self, spec: Spec, key: Tensor) -> State:
        """Add the matrices, "curvature.<name>.<mode>"."""
        state = super().init(spec, key)
        matrices = {
            f"curvature.{name}.{mode}": (
                torch.eye(size) if value.dim() > 1 else torch.ones(size)
            ).to(value)
            for name, value in state.params.items()
            if self.adapts(name)
            for mode, size in enumerate(_modes(value))
        }
        return State(state.params | matrices, state.buffers)

    def direction(self, slow: Params, name: str, gradient: Tensor) -> Tensor:
        sizes = _modes(gradient)
        matrices = [slow[f"curvature.{name}.{mode}"] for mode in range(len(sizes))]
        if gradient.dim() == 1:
            return matrices[0] * gradient
        result = gradient.reshape(sizes)
        for mode, matrix in enumerate(matrices):
            result = torch.tensordot(matrix, result.movedim(mode, 0), 1).movedim(0, mode)
        return result.reshape(gradient.shape)


def _modes(value: Tensor) -> tuple[int, ...]:
    """Return the sizes (O, I, F) of a filter [O, I, K, K], (O, I) of a matrix, (O,) of a vector."""
    return tuple(value.flatten(2).shape) if value.dim() > 2 else tuple(value.shape)
