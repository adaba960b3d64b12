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

from metalearn.algorithms.protonet import distance_scale
from metalearn.config import checking, composition
from metalearn.run.build import Run, build

Gradients = dict[str, Tensor]
#: Also the losses of the tasks [T], and mean statistics of normalisation for running averages.
Step = Callable[[Any], tuple[Gradients, Tensor, dict[str, Tensor]]]
#: The loss of a task: a function of its support set and queries.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PlainConv4(nn.Module):
    """Conv4 as an ordinary module, with the shapes of a run's parameters.

    Args:
        backbone: Settings of the run's backbone.
        params: Its parameters; without a head, images are embedded.
    """

    def __init__(self, backbone: dict[str, Any], params: dict[str, Tensor]) -> None:
        super().__init__()
        self.stride, self.mean = backbone["downsample"] == "stride", backbone["output"] == "mean"
        self.size = 0
        shapes = [params[f"net.conv{block}.weight"].shape[:2] for block in range(4)]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, filters, 3, 2 if self.stride else 1, padding=1, bias=False)
            for filters, channels in shapes
        )
        head = params.get("head.weight")
        self.norms = nn.ModuleList(
            # With momentum 1, the statistics of the last batch.
            nn.BatchNorm2d(filters, momentum=1.0, track_running_stats=head is None)
            for filters, _ in shapes
        )
        self.head = nn.Identity() if head is None else nn.Linear(head.shape[1], head.shape[0])

    def load(self, params: dict[str, Tensor]) -> dict[str, str]:
        """Copy the parameters of a run; return the names of ours by those of the run."""
        names = {
            name: re.sub(r"(conv|norm)s\.", r"net.\1", name) for name, _ in self.named_parameters()
        }
        self.load_state_dict({own: params[name].detach() for own, name in names.items()}, False)
        back = {name: own for own, name in names.items()}
        return {name: back[name] for name in params}

    def gradients(self, names: dict[str, str]) -> dict[str, Tensor]:
        """Return the gradients by the names that `load` returned."""
        own = dict(self.named_parameters())
        return {
            name: torch.zeros_like(own[key]) if own[key].grad is None else own[key].grad  # type: ignore[misc]
            for name, key in names.items()
        }

    def statistics(self, images: int) -> dict[str, Tensor]:
        """Return mean and biased variance of each normalisation in the last batch, if tracked."""
        values, size = {}, self.size
        for block, norm in enumerate(self.norms):
            mean, var = norm.running_mean, norm.running_var
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                count = images * size**2
                values[f"net.norm{block}.mean"] = mean.clone()
                values[f"net.norm{block}.var"] = var * ((count - 1) / count)
            size //= 2
        return values

    def forward(self, x: Tensor) -> Tensor:
        """Embed images [B, C, H, W], or classify them if there is a head."""
        self.size = x.shape[-1]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = x if self.stride else F.max_pool2d(x, 2)
        return self.head(x.mean((-2, -1)) if self.mean else x.flatten(1))


def build_run(overrides: list[str], device: str) -> Run:
    """Build a run: on glyphs with the network of Omniglot's recipe, on CIFAR-FS with its own."""
    pools = "algo=protonet" in overrides or "dataset=cifar_fs" in overrides
    words = [
        "dataset=glyphs",
        "logger=none",
        f"device={device}",
        "episode.train.way=${episode.way}",
        *([] if pools else ["backbone.downsample=stride", "backbone.output=mean"]),
        *overrides,
    ]
    return build(checking.check_config(composition.compose_config(words)))


def plain_step(run: Run) -> Step:
    """Return the plain loop of a run: of MAML, first-order MAML or ANIL, else of ProtoNet.

    Returns:
        A function of tasks, for the parameters that `run.state` has at that moment.
    """
    loss, model = _gradient_loss(run) if "inner_steps" in run.config.algo else _metric_loss(run)
    model.to(run.device)

    def step(tasks: Any) -> tuple[Gradients, Tensor, dict[str, Tensor]]:
        names, losses, statistics = model.load(run.state.params), [], []
        model.zero_grad()
        for support, query in zip(
            *(zip(part.x, part.y, strict=True) for part in (tasks.support, tasks.query)),
            strict=True,
        ):
            value = loss(*support, *query)
            (value / len(tasks.key)).backward()
            losses.append(value.detach())
            statistics.append(model.statistics(len(support[0]) + len(query[0])))
        means = {
            name: torch.stack([one[name] for one in statistics]).mean(0) for name in statistics[0]
        }
        return model.gradients(names), torch.stack(losses), means

    return step


def _gradient_loss(run: Run) -> tuple[Loss, PlainConv4]:
    settings = run.config.algo
    model = PlainConv4(run.config.backbone, run.state.params)
    first_order, head_only = settings["first_order"], settings["adapted_part"] == "head"
    adapted = [
        name
        for name, _ in model.named_parameters()
        if name.startswith("head") or not (head_only or "norm" in name)
    ]

    def loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        weights: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(settings["inner_steps"]):
            value = F.cross_entropy(functional_call(model, weights, support_x), support_y)
            gradients = torch.autograd.grad(
                value, [weights[name] for name in adapted], create_graph=not first_order
            )
            weights |= {
                name: weights[name] - settings["inner_lr"] * gradient
                for name, gradient in zip(adapted, gradients, strict=True)
            }
        return F.cross_entropy(functional_call(model, weights, query_x), query_y)

    return loss, model


def _metric_loss(run: Run) -> tuple[Loss, PlainConv4]:
    way = run.config.episode.train.way
    model = PlainConv4(run.config.backbone, run.state.params)
    temperature = run.config.algo["temperature"]

    def loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        z = model(torch.cat([support_x[support_y.argsort()], query_x]))
        means = z[: len(support_y)].unflatten(0, (way, -1)).mean(1)
        logits = -torch.cdist(z[len(support_y) :], means).square() / (
            temperature or distance_scale(z)
        )
        return F.cross_entropy(logits, query_y)

    return loss, model
