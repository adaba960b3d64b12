"""Meta-optimisers by their torch name: learning rate, clipped gradients, steps."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from metalearn.config.arguments import check_arguments
from metalearn.config.checking import no_such_optimiser
from metalearn.config.schema import TrainConfig
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.types import Params

#: Optimisers that cannot take one step per gradient, and why.
_UNSUPPORTED = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "meta-gradients are dense",
    "Muon": "it accepts only matrices",
}
#: Arguments that the run or the engine sets, not the user.
_RESERVED = {"self", "params", "lr", "foreach", "fused", "capturable", "differentiable"}


def _class(settings: dict[str, Any]) -> type[torch.optim.Optimizer]:
    base, target = torch.optim.Optimizer, str(settings.get("_target_"))
    known = {
        f"torch.optim.{name}": cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, base) and cls is not base
    }
    if target not in known:
        raise no_such_optimiser(target, list(known))
    if reason := _UNSUPPORTED.get(known[target].__name__):
        raise UserError(f"optimiser._target_={target}: is not possible here, because {reason}")
    return known[target]


def make(settings: dict[str, Any], lr: float, leaves: list[Tensor]) -> torch.optim.Optimizer:
    """Make the optimiser of the `optimiser` settings for tensors on one device, or raise UserError.

    On CUDA, the learning rate is a tensor if the optimiser can be captured in a graph.
    """
    cls = _class(settings)
    own = {key: value for key, value in settings.items() if key != "_target_"}
    accepted = inspect.signature(cls.__init__).parameters
    own = check_arguments(cls.__init__, own, "optimiser", cls.__name__, _RESERVED)
    rate: Any = lr
    if leaves[0].device.type == "cuda":
        if "capturable" in accepted:
            own["capturable"] = True
        elif can_be_captured(cls):
            own["fused"] = True
        if can_be_captured(cls):
            rate = torch.tensor(lr, device=leaves[0].device)
    try:
        return cls(leaves, lr=rate, **own)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimiser: {cls.__name__} refuses its settings ({first_line(error)})"
        ) from None


def check(settings: dict[str, Any]) -> None:
    """Raise UserError for settings that `make` would refuse."""
    make(settings, 1e-3, [torch.zeros(1)])


def can_be_captured(cls: type[torch.optim.Optimizer]) -> bool:
    """Return True if a step of the optimiser can be part of a CUDA graph."""
    accepted = inspect.signature(cls.__init__).parameters
    # Adagrad is fused on the CPU only.
    return "capturable" in accepted or ("fused" in accepted and cls is not torch.optim.Adagrad)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 0.

    It is that of `train.lr` and `train.schedule`, times (step + 1) / warmup in the warm-up.
    """
    progress = step / max(1, train.steps)
    factor = 1.0
    if train.schedule == "linear":
        factor = 1 - progress
    elif train.schedule == "cosine":
        factor = (1 + math.cos(math.pi * step / max(1, train.steps))) / 2
    elif train.schedule == "step":
        factor = train.schedule_factor ** (step // train.schedule_every)
    elif train.schedule == "milestones":
        steps = [one if one >= 1 else one * train.steps for one in train.milestones]
        factor = train.schedule_factor ** sum(step >= one for one in steps)
    return train.lr * (factor * min(1.0, (step + 1) / max(1, train.warmup)))


def set_learning_rate(optimiser: torch.optim.Optimizer, train: TrainConfig, step: int) -> None:
    """Set the learning rate of a step, counted from 0."""
    lr = learning_rate(train, step)
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)  # a CUDA graph reads this tensor
        else:
            group["lr"] = lr


def clip_gradients(gradients: Params, settings: TrainConfig) -> list[Tensor]:
    """Return meta-gradients clipped by `train.clip_value`, then by `train.clip_norm`."""
    values = list(gradients.values())
    if settings.clip_value is not None:
        values = [value.clamp(-settings.clip_value, settings.clip_value) for value in values]
    if settings.clip_norm is not None:
        norm = torch.stack([value.square().sum() for value in values]).sum().sqrt()
        scale = (settings.clip_norm / (norm + 1e-12)).clamp_max(1)
        values = [value * scale for value in values]
    return values


def step_if(optimiser: torch.optim.Optimizer, finite: Tensor, can_wait: bool) -> bool:
    """Take a step if `finite`, bool []; return False if it is known that none was taken.

    Unless `can_wait`, nothing is read on the host: the step is always taken, and undone if not
    finite. This requires all optimiser state to exist and to be on the device, which is not the
    case at the first step.
    """
    state = [
        value
        for values in optimiser.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    if can_wait or any(value.device != finite.device for value in state):
        if finite:
            optimiser.step()
        return bool(finite)
    tensors = [*(leaf for group in optimiser.param_groups for leaf in group["params"]), *state]
    before = [value.detach().clone() for value in tensors]
    optimiser.step()
    with torch.no_grad():
        for value, old in zip(tensors, before, strict=True):
            value.copy_(torch.where(finite, value, old))
    return True
