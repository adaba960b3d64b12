"""Define the typed schema of `conf/`.

Nothing here imports torch, so that a mistyped name is reported at once.
"""

import dataclasses
from typing import Any

from metalearn.config.fields import above, at_least, between, choice, count_or_range, setting

#: Amounts of training; each recipe says what they mean.
BUDGETS = ("smoke", "quick", "day", "paper")


@dataclasses.dataclass(kw_only=True)
class EpisodeShape:
    """Episodes; see `metalearn.tasks.sampling.Shape`. A range [low, high] includes both."""

    way: int | list[int] = count_or_range()
    shot: int | list[int] = count_or_range()
    query: int = at_least(1)
    unlabelled: int = at_least(0, default=0)
    distractors: int = at_least(0, default=0)
    unbalanced: bool = setting(default=False)
    sampler: str = choice("uniform", "hierarchical", "hard", default="uniform")
    dirichlet: int = at_least(0, default=0)


@dataclasses.dataclass(kw_only=True)
class EpisodeConfig(EpisodeShape):
    """Episodes of validation and test; `train`: of training."""

    train: EpisodeShape = setting(role="identity")


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """Meta-training; conf/base.yaml explains each setting."""

    source: str = choice("episodes", "batches")
    batch_size: int = at_least(1)
    steps: int = at_least(0)
    start: str | None = setting(default=None)
    meta_batch: int = at_least(1)
    optimiser: str | None = choice("adam", "sgd", default=None)
    lr: float = above(0)
    schedule: str = choice("constant", "linear", "cosine", "step", "milestones")
    schedule_every: int = at_least(1)
    milestones: list[float] = above(0, default=[])
    warmup: int = at_least(0, default=0)
    schedule_factor: float = above(0)
    clip_value: float | None = above(0)
    clip_norm: float | None = above(0)
    ema: float | None = between(0, 1, default=None)
    statistics_momentum: float = between(0, 1)
    log_every: int = at_least(1, role="presentation")
    patience: int = at_least(0)
    nonfinite: str = choice("stop", "skip", role="machine")


@dataclasses.dataclass(kw_only=True)
class ValConfig:
    """Validation."""

    every: int = at_least(1)
    episodes: int = at_least(2)


@dataclasses.dataclass(kw_only=True)
class TestConfig:
    """Testing."""

    __test__ = False  # not a test class for pytest

    episodes: int = at_least(2)
    overlap: str = choice("refuse", "allow", default="refuse")
    when: str = choice("auto", "always", "best", default="auto", role="presentation")


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = at_least(1)
    keep: int = at_least(1, default=1)


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
    """How a run is computed; conf/base.yaml explains each setting."""

    strategy: str = choice("auto", "vmap", "loop", "mixed", rounds=True)
    task_chunk: int = at_least(0)
    evaluation_batch: int = at_least(1, default=32, rounds=True)
    threads: int = at_least(0, rounds=True)
    precision: str = choice("fp32", "tf32", "bf16", rounds=True)
    convolution: str = choice("auto", "plain", "unfold", "direct", rounds=True)
    cuda_graph: bool = setting(default=True)
    rematerialise: bool = setting(rounds=True)
    features: bool = setting(default=False, rounds=True)
    profile: bool = setting()
    choices: str | None = setting(rounds=True)


@dataclasses.dataclass(kw_only=True)
class LossConfig:
    """Losses by name, null for the default: of queries and batches, and of inner loops."""

    name: str | None = setting(default=None)
    inner: str | None = setting(default=None)
    settings: dict[str, Any] = setting(default={})
    inner_settings: dict[str, Any] = setting(default={})


@dataclasses.dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of inputs; each name maps to its settings.

    A name of your own choice can stand for a plugin's function, given as the setting `_target_`.
    """

    #: Of training inputs, in order.
    ops: dict[str, Any] = setting(default={})
    #: Ways to mix the examples of a training batch or query set; one is drawn for each.
    mix: dict[str, Any] = setting(default={})
    #: Of the support copies of a method that uses some.
    support: dict[str, Any] = setting(default={}, role="identity protocol")


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """Settings of a run; algo, dataset and backbone are checked against their `_target_`."""

    algo: Any = setting(role="identity protocol")
    dataset: Any = setting(role="identity protocol")
    backbone: Any = setting(role="identity")
    optimiser: dict[str, Any] = setting(role="identity")
    loss: LossConfig = setting(role="identity")
    augment: AugmentConfig = setting(role="identity")
    episode: EpisodeConfig = setting(role="identity protocol")
    logger: dict[str, Any] = setting(role="presentation", components="logger")
    train: TrainConfig = setting(role="identity")
    val: ValConfig = setting(role="identity")
    test: TestConfig = setting(role="protocol")
    test_dataset: list[str] = setting(default=[], role="presentation")
    checkpoint: CheckpointConfig = setting(role="machine")
    engine: EngineConfig = setting(role="machine")
    budget: str = choice(*BUDGETS, default="day", role="identity")
    seed: int = setting(role="seed")
    episode_seed: int = setting(role="identity protocol")
    statistics: str = choice(
        "query", "support", "support_plus_one", "population", role="identity protocol"
    )
    device: str = choice("auto", "cpu", "cuda", role="machine", rounds=True)
    data_dir: str | None = setting(role="machine")
    cache_dir: str | None = setting(role="machine")
    resume: str = choice("never", "auto", role="presentation")


COMPONENTS = ("algo", "dataset", "backbone")
