"""A plugin with unusual methods, datasets and backbones that the package must support unchanged."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.batches import BatchTraining
from metalearn.algorithms.embedding import EmbeddingAlgorithm
from metalearn.algorithms.geometry import class_means, squared_distance
from metalearn.algorithms.linear_head import LinearHeadAlgorithm
from metalearn.algorithms.params import prefixed, select
from metalearn.backbones.base import Backbone
from metalearn.config.fields import above, at_least
from metalearn.data.base import Dataset
from metalearn.data.classes import ClassData
from metalearn.tasks import prng
from metalearn.tasks.augment import AUGMENTATIONS
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.metrics import Metric
from metalearn.tasks.sampling import STREAMS, numbered_keys
from metalearn.tasks.store import ArrayStore, ClassIndex, ClassView
from metalearn.tasks.types import InputSpec, Loss, Query, State, Support, Task


def network(algorithm, spec, key):
    params, population = algorithm.backbone.init(spec.inputs, prng.fold_in(key, 0))
    return prefixed(params, "net"), prefixed(population, "net")


class Transfer(BatchTraining):
    """Train a linear layer over all training classes on batches; adapt by nearest class mean."""

    def init(self, spec, key):
        net, population = network(self, spec, key)
        size = math.prod(self.backbone.shape(spec.inputs))
        return State(net | self.init_classifier(spec, size, prng.fold_in(key, 1)), population)

    def adapt(self, state, support, *, key, steps=None):
        z, reference = self.normalisation.embed_support(state, support.x)
        return class_means(z, support.y, support.way), reference

    def forward(self, state, learner, x, key):
        means, reference = learner
        z, seen = self.normalisation.embed_queries(
            state, select(state.params, "net"), reference, x, key
        )
        return -squared_distance(z, means), seen


class MultiStep(LinearHeadAlgorithm):
    """Learn a rate for each inner step, and average the loss over all inner steps (as MAML++)."""

    def init(self, spec, key):
        state = super().init(spec, key)
        return State(
            state.params | {"inner_lr": torch.full((3,), 0.1, device=key.device)}, state.buffers
        )

    def trajectory(self, state, support, key, steps):
        theta = {name: value for name, value in state.params.items() if name != "inner_lr"}

        def net(params, x):
            return self.head(params, self.embed(params, x, self.given(state))), {}

        for step in range(steps):
            yield theta
            gradient = torch.func.grad(
                lambda theta: self.family.support_loss(net, theta, support, key)
            )(theta)
            theta = {
                name: theta[name] - state.params["inner_lr"][step] * gradient[name]
                for name in theta
            }
        yield theta

    def adapt(self, state, support, *, key, steps=None):
        *_, last = self.trajectory(state, support, key, 3 if steps is None else steps)
        return self.adapted(last, support.x)

    def loss(self, state, task, progress):
        losses = [
            self.query_loss(state, self.adapted(theta, task.support.x), task.query, task.key)
            for theta in self.trajectory(state, task.support, task.key, 3)
        ]
        return Loss(
            torch.stack([loss.value for loss in losses]).mean(),
            losses[-1].logs,
            losses[-1].statistics,
        )


class Memory(NamedTuple):
    hidden: Tensor
    reference: dict[str, Tensor]


class Sequence(Algorithm):
    """Read (embedding, label) pairs with a recurrent cell; its last state is the learner."""

    fixed_way = True
    class_equivariant = False
    support_order_matters = True

    def init(self, spec, key):
        net, population = network(self, spec, key)
        size = math.prod(self.backbone.shape(spec.inputs))
        for number, (name, rows) in enumerate({"cell": 16, "read": spec.way}.items()):
            columns = size + spec.way + 16 if name == "cell" else size + 16
            net[f"{name}.weight"] = (
                prng.normal(prng.fold_in(key, number + 1), (rows, columns)) * columns**-0.5
            )
        return State(net, population)

    def adapt(self, state, support, *, key, steps=None):
        z, reference = self.normalisation.embed_support(state, support.x)
        inputs = torch.cat([z, F.one_hot(support.y, support.way).to(z.dtype)], -1)
        hidden = torch.zeros_like(state.params["cell.weight"][:, 0])
        for row in inputs:
            hidden = torch.tanh(state.params["cell.weight"] @ torch.cat([row, hidden]))
        return Memory(hidden, reference)

    def forward(self, state, learner, x, key):
        net = select(state.params, "net")
        z, seen = self.normalisation.embed_queries(state, net, learner.reference, x, key)
        hidden = learner.hidden.expand(len(z), -1)
        return torch.cat([z, hidden], -1) @ state.params["read.weight"].T, seen


class Ridge(EmbeddingAlgorithm):
    """Solve a linear system on the support set (as R2D2)."""

    def init_head(self, spec, size, key):
        return {"log_lambda": torch.zeros((), device=key.device)}

    def learn(self, weights, z, support, key):
        y = F.one_hot(support.y, support.way).to(z.dtype)
        gram = z @ z.T + weights["log_lambda"].exp() * torch.eye(
            len(z), dtype=z.dtype, device=z.device
        )
        return z.T @ torch.linalg.solve_ex(gram, y)[0]

    def compare(self, weights, learned, z):
        return z @ learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftMeans(EmbeddingAlgorithm):
    """Refine class means once with soft-assigned unlabelled examples (as Ren et al. 2018)."""

    uses_unlabelled: ClassVar[bool] = True

    temperature: float = above(0)

    def learn(self, weights, z, support, key):
        labelled, unlabelled = z.split([len(support.y), len(z) - len(support.y)])
        member = F.one_hot(support.y, support.way).to(z.dtype)
        means = class_means(labelled, support.y, support.way)
        soft = (-squared_distance(unlabelled, means) / self.temperature).softmax(-1)
        weight = torch.cat([member, soft])
        return weight.T @ z / weight.sum(0)[:, None]

    def compare(self, weights, learned, z):
        return -squared_distance(z, learned) / self.temperature


# Control: an agent on a line must reach a goal that it cannot observe.

_HORIZON, _ROLLOUTS = 6, 12


@dataclasses.dataclass(frozen=True)
class Steering:
    """Control of a policy x -> mean action; a task is a goal, its score the mean return."""

    target: str = "control"
    metric: Metric = Metric("return", True, lambda prediction, y: prediction)
    predicts: bool = False

    def init(self, spec, key):
        return {"log_std": torch.full((1,), -1.0, device=key.device)}

    def rollouts(self, net, params, goal, key):
        """Return rewards and differentiable log-probabilities, each [_HORIZON, _ROLLOUTS]."""
        log_std = params["head.log_std"]
        position, rewards, log_probabilities = torch.zeros_like(goal).expand(_ROLLOUTS, 1), [], []
        for step in range(_HORIZON):
            mean = net(params, position)[0]
            noise = prng.normal(prng.fold_in(key, step), (_ROLLOUTS, 1)).to(goal.dtype)
            action = (mean + log_std.exp() * noise).detach()
            log_probabilities.append(
                (-(((action - mean) / log_std.exp()) ** 2) / 2 - log_std).sum(-1)
            )
            position = position + 0.3 * action.clamp(-1, 1)
            rewards.append(-(position - goal).abs().sum(-1))
        return torch.stack(rewards), torch.stack(log_probabilities)

    def surrogate(self, net, params, goal, key):
        rewards, log_probabilities = self.rollouts(net, params, goal, key)
        to_go = rewards.flip(0).cumsum(0).flip(0)
        advantage = (to_go - to_go.mean(1, keepdim=True)) / (to_go.std(1, keepdim=True) + 1e-6)
        return -(log_probabilities * advantage).mean(), rewards.sum(0).mean().detach()

    def support_loss(self, net, params, support, key):
        return self.surrogate(net, params, support.x[0], key)[0]

    def query_loss(self, net, params, query, key):
        value, reward = self.surrogate(net, params, query.x[0], prng.fold_in(key, 7))
        return Loss(value, {"loss": value.detach(), "return": reward}, {})

    def score(self, net, params, query, key):
        return self.rollouts(net, params, query.x[0], prng.fold_in(key, 8))[0].sum(0).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goals(Dataset):
    """Goals on both sides, so that no policy reaches all of them without adapting."""

    target: ClassVar[str] = "control"

    distance: float = above(0)

    def family(self, loss, inner_loss, settings):
        return Steering()

    def open(self, data_dir, cache_dir, device):
        return OpenGoals(self.distance, device)


class OpenGoals:
    inputs, outputs, content_hash = InputSpec((1,)), 1, "goals"
    standardisation: ClassVar[dict[str, list[float]]] = {}

    def __init__(self, distance, device):
        self.distance, self.device = distance, device

    def class_names(self, split):
        return ()

    def num_classes(self, split):
        return 0

    def protocol(self, split):
        return {"data": self.content_hash, "distance": self.distance}

    def episodes(self, split, shape, seed, augment=None):
        return GoalTasks(self.distance, prng.key_of(seed, STREAMS[split], device=self.device))

    def batches(self, split, size, seed, augment=None):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class GoalTasks:
    distance: float
    key: Tensor

    def classes(self, first, count):
        return None

    def draw(self, first, count):
        key = numbered_keys(self.key, first, count)
        goal = self.distance * torch.where(prng.uniform(key, (1, 1)) < 0.5, -1.0, 1.0)
        return Task(Support(goal, goal, 1), Query(goal, goal), prng.fold_in(key, 1))


# Text: sequences of tokens.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences(Dataset):
    """Sentences of a few class-specific words among words that all classes share."""

    num_classes: int = at_least(3)

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        key, per_class, length, specific = prng.key_of(0), 20, 8, 3
        names = tuple(f"topic{number}" for number in range(self.num_classes))
        words = prng.integers(prng.fold_in(key, 0), (self.num_classes, 1, specific), 200) + 1
        filler = (
            prng.integers(
                prng.fold_in(key, 1), (self.num_classes, per_class, length - specific), 10
            )
            + 201
        )
        tokens = torch.cat([words.expand(-1, per_class, -1), filler], -1).flatten(0, 1)
        third, views = self.num_classes // 3, {}
        for number, split in enumerate(("train", "val", "test")):
            classes = torch.arange(number * third, (number + 1) * third)
            rows = classes[:, None] * per_class + torch.arange(per_class)
            index = ClassIndex(
                rows.to(device),
                torch.full((third,), per_class).to(device),
                names[number * third :][:third],
            )
            views[split] = ClassView(index)
        store = ArrayStore(tokens.to(device), vocabulary=211)
        return ClassData(dict.fromkeys(views, store), views, f"sentences{self.num_classes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bag(Backbone):
    """Average learned token embeddings, then apply a linear layer with normalisation."""

    input_kinds: ClassVar[tuple[str, ...]] = ("tokens",)

    width: int = at_least(1)

    def init(self, inputs, key):
        assert inputs.vocabulary is not None
        params = {
            "embedding": prng.normal(prng.fold_in(key, 0), (inputs.vocabulary, self.width)),
            "linear.weight": prng.normal(prng.fold_in(key, 1), (self.width, self.width))
            * self.width**-0.5,
            "norm.weight": torch.ones(self.width, device=key.device),
            "norm.bias": torch.zeros(self.width, device=key.device),
        }
        zero, one = params["norm.bias"].clone(), params["norm.weight"].clone()
        return params, {"norm.mean": zero, "norm.var": one}

    def shape(self, inputs):
        return (self.width,)

    def forward(self, params, x, norm, key):
        mean = params["embedding"][x].mean(1)
        return norm("norm", F.linear(mean, params["linear.weight"])).relu()


# A loss and an augmentation.


def cubic(prediction: Tensor, y: Tensor, power: float = 3.0) -> Tensor:
    """Compute the mean of (1 - p)^power, p the probability of the correct class."""
    return (1 - prediction.softmax(-1).gather(-1, y[:, None])).pow(power).mean()


def darken(x: Tensor, key: Tensor, least: float = 0.5) -> Tensor:
    """Multiply each image by a random number between `least` and 1."""
    return x * (least + (1 - least) * prng.uniform(key, (1, 1, 1)))


LOSSES["class"]["cubic"] = cubic
AUGMENTATIONS["darken"] = darken

__all__: list[Any] = []
