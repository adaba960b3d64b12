"""Plain PyTorch loops over tasks, which the engine's speed is compared with.

They do what the field's libraries do: one task after the other, with
`torch.func.functional_call` on the adapted weights, `torch.autograd.grad(create_graph=True)` for
the inner step, and `backward` of each task's query loss.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metalearn.run.build import Run

Gradients = dict[str, Tensor]
#: Computes the meta-gradient of some tasks, named as the parameters of a run.
Step = Callable[[], Gradients]


class PlainConv4(nn.Module):
    """Conv4 as an ordinary module, downsampled by stride or else by max-pooling."""

    def __init__(self, filters: int, stride: bool, mean: bool, way: int | None) -> None:
        super().__init__()
        self.stride, self.mean = stride, mean
        self.convs = nn.ModuleList(
            nn.Conv2d(
                filters if block else 1, filters, 3, 2 if stride else 1, padding=1, bias=False
            )
            for block in range(4)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(filters, track_running_stats=False) for _ in range(4)
        )
        features = filters * (1 if mean or not stride else 4)
        self.head = nn.Linear(features, way) if way else nn.Identity()

    def load(self, params: dict[str, Tensor]) -> dict[str, str]:
        """Copy the parameters of a run; return the names of ours by those of the run."""
        names = {
            name: re.sub(r"(conv|norm)s\.", r"net.\1", name) for name, _ in self.named_parameters()
        }
        self.load_state_dict({own: params[name].detach() for own, name in names.items()})
        return {name: own for own, name in names.items()}

    def gradients(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Return the gradients by the names that `load` returned."""
        own = dict(self.named_parameters())
        return {
            name: torch.zeros_like(own[key]) if own[key].grad is None else own[key].grad  # type: ignore[misc]
            for name, key in names.items()
        }

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, 1, H, W], or classify them if `way` was given."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = x if self.stride else F.max_pool2d(x, 2)
        return self.head(x.mean((-2, -1)) if self.mean else x.flatten(1))


def plain_gradient_step(run: Run, tasks: Any) -> Step:
    """Return a plain loop that computes a meta-gradient of MAML, first-order MAML or ANIL."""
    settings = run.config.algo
    model = PlainConv4(run.config.backbone["filters"], True, True, tasks.support.way).to(run.device)
    names = model.load(run.state.params)
    first_order, head_only = settings["first_order"], settings["adapted_part"] == "head"
    adapted = [
        name
        for name, _ in model.named_parameters()
        if name.startswith("head") or not (head_only or "norm" in name)
    ]

    def step() -> Gradients:
        model.zero_grad()
        for task in range(tasks.key.shape[0]):
            weights: dict[str, torch.Tensor] = dict(model.named_parameters())
            for _ in range(settings["inner_steps"]):
                loss = F.cross_entropy(
                    functional_call(model, weights, tasks.support.x[task]), tasks.support.y[task]
                )
                gradients = torch.autograd.grad(
                    loss, [weights[name] for name in adapted], create_graph=not first_order
                )
                weights |= {
                    name: weights[name] - settings["inner_lr"] * gradient
                    for name, gradient in zip(adapted, gradients, strict=True)
                }
            loss = F.cross_entropy(
                functional_call(model, weights, tasks.query.x[task]), tasks.query.y[task]
            )
            (loss / tasks.key.shape[0]).backward()
        return model.gradients(names)

    return step


def plain_metric_step(run: Run, tasks: Any) -> Step:
    """Return a plain loop that computes a meta-gradient of ProtoNet."""
    model = PlainConv4(run.config.backbone["filters"], False, False, None).to(run.device)
    names = model.load(run.state.params)

    def step() -> Gradients:
        model.zero_grad()
        for task in range(tasks.key.shape[0]):
            shots = tasks.support.y.shape[1] // tasks.support.way
            order = tasks.support.y[task].argsort()
            z = model(torch.cat([tasks.support.x[task][order], tasks.query.x[task]]))
            means = z[: len(order)].unflatten(0, (tasks.support.way, shots)).mean(1)
            loss = F.cross_entropy(
                -torch.cdist(z[len(order) :], means).square(), tasks.query.y[task]
            )
            (loss / tasks.key.shape[0]).backward()
        return model.gradients(names)

    return step
