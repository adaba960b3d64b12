"""A method under test: small runs of it, and one that is trained briefly."""

import copy
import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

from torch.utils import _pytree as pytree

from metalearn.algorithms.base import Algorithm
from metalearn.config import checking, components, composition
from metalearn.config.schema import RunConfig
from metalearn.engine import Engine
from metalearn.report.progress import SILENT
from metalearn.report.stats import estimate
from metalearn.run import loop, scoring
from metalearn.run.build import Run, build
from metalearn.run.parts import family_of
from metalearn.tasks import prng
from metalearn.tasks.sampling import BatchSampler

#: Few episodes.
_SMALL = (
    "episode.way=5", "episode.shot=1", "episode.query=5", "train.meta_batch=4",
    "train.batch_size=64", "val.episodes=100", "test.episodes=100", "logger=none", "device=cpu",
)  # fmt: skip
#: Easy classes of feature vectors and a small network; images, for methods that compare views.
_FEATURES = ("dataset=gaussians", "backbone.hidden=[16]")
_IMAGES = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.drawings=10", "dataset.image_size=12",
    "dataset.jitter=0.7", "augment=views", "backbone=mlp", "backbone.hidden=[32]",
)  # fmt: skip
STEPS, LR = 60, 0.01


def as_double(tree: Any) -> Any:
    """Return the same tree in float64."""
    return pytree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method under test: its name in `conf/algo/`, or its class, and its settings.

    It is trained for `steps` steps with the learning rate `lr`.
    """

    cls: str | type[Algorithm]
    settings: tuple[tuple[str, Any], ...] = ()
    steps: int = STEPS
    lr: float = LR

    @functools.cached_property
    def _configs(self) -> dict[tuple[str, ...], RunConfig]:
        return {}

    @functools.cached_property
    def _small(self) -> tuple[str, ...]:
        cls: Any = self.cls
        if isinstance(cls, str):
            cls = components.component(composition.compose_config([f"algo={cls}"]).algo, "algo")
        return *_SMALL, *(_IMAGES if cls.num_views > 1 else _FEATURES)

    def _config(self, words: tuple[str, ...]) -> RunConfig:
        """Return the checked configuration of a small run, composed once for the same words."""
        if words not in self._configs:
            if isinstance(self.cls, str):
                own = [f"algo.{name}={value}" for name, value in self.settings]
                overrides = [f"algo={self.cls}", *self._small, *own, *words]
            else:
                source = "batches" if "episodes" not in self.cls.sources else "episodes"
                overrides = ["algo=protonet", *self._small, f"train.source={source}", *words]
            config = checking.check_config(composition.compose_config(overrides))
            if not config.optimiser["_target_"].endswith("SGD"):
                config.train.lr = self.lr
            self._configs[words] = config
        return copy.deepcopy(self._configs[words])

    def run(self, *words: str, **changes: Any) -> Run:
        """Return a small run of the method.

        Args:
            *words: Overrides of its configuration.
            **changes: Values of `seed` or `statistics`.
        """
        config = dataclasses.replace(self._config(words), **changes)
        run = build(config)
        if isinstance(self.cls, str):
            return run
        algorithm = self.cls(
            backbone=run.algorithm.backbone,
            statistics=config.statistics,
            family=family_of(config),
            source=config.train.source,
            **dict(self.settings),
        )
        state = algorithm.init(run.spec, prng.key_of(config.seed, 100))
        engine = Engine(algorithm, "vmap", 4)
        train = run.train
        if isinstance(train, BatchSampler):
            train = dataclasses.replace(train, num_views=algorithm.num_views)
        return dataclasses.replace(
            run, algorithm=algorithm, state=state, train=train, train_engine=engine,
            test_engine=engine,
        )  # fmt: skip

    @functools.cached_property
    def trained(self) -> tuple[Run, float, float, Any]:
        """Train briefly. Return (run, validation before and after, trained state)."""
        run = self.run(f"train.steps={self.steps}", f"val.every={self.steps}")
        assert run.val is not None
        before = scoring.evaluate(run, run.state, run.val, 100)
        with tempfile.TemporaryDirectory() as folder:
            fitted = loop.fit(run, SILENT, Path(folder))
        sign = 1 if run.metric.higher_is_better else -1
        first = estimate(sign * before)
        return run, first.mean + first.ci95, sign * fitted.best_val.mean, fitted.state
