"""Helpers for the tests of methods: a small task in float64, and gradients by the engine."""

from typing import Any

import torch
import torch.nn.functional as F

from metalearn.backbones.mlp import MLP
from metalearn.engine import Engine
from metalearn.tasks import prng
from metalearn.tasks.types import Query, Spec, Support, Task
from tests.fixtures import to_float64

IDENTITY = MLP(hidden=[], normalisation="none", activation="relu", eps=1e-5)
NET = MLP(hidden=[5], normalisation="none", activation="tanh", eps=1e-5)
NORMALISED = MLP(hidden=[5], normalisation="batch", activation="tanh", eps=1e-5)
COMMON: dict[str, Any] = dict(backbone=NET, statistics="query")
GRADIENT: dict[str, Any] = dict(
    inner_lr=0.3,
    inner_steps=2,
    test_inner_steps=2,
    first_order=False,
    adapted_part="all",
    pull=0.0,
    adapt_normalisation=False,
    inner_loss="mean",
)
KEY = torch.zeros((), dtype=torch.int64)
PROGRESS = torch.zeros((), dtype=torch.float64)


def make_task(shot=2, way=3, query=4, features=4, seed=0):
    torch.manual_seed(seed)
    parts = []
    for examples in (shot, query):
        y = torch.arange(way).repeat(examples)
        parts.append((torch.randn(way * examples, features).double() + F.one_hot(y, features), y))
    return Task(Support(*parts[0], way), Query(*parts[1]), KEY)


def init_state(algorithm, way=3, features=4, classes=0):
    return to_float64(algorithm.init(Spec((features,), way, classes, "class"), prng.key_of(0)))


def batch_of_one(task):
    return torch.utils._pytree.tree_map(lambda leaf: leaf[None], task)


def gradients(algorithm, state, task, progress=PROGRESS):
    return Engine(algorithm, "loop", 1).step(state, batch_of_one(task), progress).gradients


def predictions(algorithm, state, task, **options):
    return algorithm.predict(
        state, algorithm.adapt(state, task.support, key=KEY, **options), task.query.x
    )


def network(params, x):
    z = torch.tanh(x @ params["net.linear0.weight"].T + params["net.linear0.bias"])
    return z @ params["head.weight"].T + params["head.bias"]
