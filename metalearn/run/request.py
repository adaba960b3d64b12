"""A requested test of a finished run: what it may change, and the run under its protocol."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metalearn.config import components, composition, paths, roles
from metalearn.config.checking import check_config
from metalearn.config.schema import RunConfig
from metalearn.data.base import OpenDataset
from metalearn.report.console import open_console
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.report.progress import Progress
from metalearn.report.result import Result
from metalearn.run import checkpoint, other_data
from metalearn.run.build import Run, build
from metalearn.run.engines import FREE_CHOICES, read_choices
from metalearn.run.measure import measure
from metalearn.run.pairings import check_population, inductive_counterpart
from metalearn.run.parts import algorithm_of, data_folder, device_of
from metalearn.system.errors import UserError
from metalearn.tasks.types import State


@dataclasses.dataclass(frozen=True)
class Request:
    """A trained run and the requested test."""

    files: RunFolder
    own: Result  # of the run itself
    before: RunConfig  # of the run
    changed: DictConfig  # the configuration of the test
    after: RunConfig  # the same, checked
    variant: list[str]  # settings of the adaptation that differ from the run's own test
    overrides: list[str]
    split: str  # the split whose classes are tested
    inputs: other_data.Inputs  # of the trained network, if the test's data may differ from its own

    @staticmethod
    def of(folder: Path, overrides: list[str], split: str) -> "Request":
        """Return the request; raise UserError if the run is not trained or cannot be so tested."""
        if split not in other_data.SPLITS:
            raise UserError(f"split={split}: should be one of {', '.join(other_data.SPLITS)}")
        files = RunFolder(folder)
        if not files.is_trained:
            raise files.unfinished()
        own = files.read_result()
        stored = composition.load_config(folder)
        stored.engine.choices = None  # the training's; the file may be gone
        inputs = other_data.Inputs(None, None)
        if any(word.lstrip("+").startswith("dataset") for word in overrides):
            inputs = other_data.Inputs(*checkpoint.inputs(files.best))
        overrides = other_data.apply_target(stored, overrides, inputs)
        # Groups first, because the others may set what a chosen dataset has.
        changed = stored
        for word in sorted(overrides, key=lambda word: word.partition("=")[0] not in _GROUPS):
            changed = _apply(changed, word)
        paths.make_absolute(changed, overrides, data_folder(check_config(changed)))
        before, after = check_config(stored), check_config(changed)
        other_data.check_kind(before, after)
        has_fixed_way = algorithm_of(after, is_restored=True).fixed_way
        if has_fixed_way and after.episode.way != before.episode.way:
            raise UserError(
                f"episode.way={after.episode.way}: the run distinguishes {before.episode.way} "
                "classes, the number of ways is part of its weights; train with that number"
            )
        own_algo = sorted(after.algo.items())
        variant = [f"{key}={value}" for key, value in own_algo if before.algo[key] != value]
        if after.engine.precision != before.engine.precision:
            variant.append(f"precision={after.engine.precision}")
        return Request(files, own, before, changed, after, variant, overrides, split, inputs)

    @property
    def statistics(self) -> list[str]:
        """The requested statistics, then their counterpart if only they decide on transduction."""
        own = self.after.statistics
        algorithm = algorithm_of(self.after, is_restored=True)
        backbone = algorithm.backbone
        if not backbone.normalises or backbone.is_external or algorithm.is_transductive:
            return [own]
        return [own, inductive_counterpart(self.before, own)]

    @functools.cached_property
    def data(self) -> OpenDataset:
        """The data of the test, in the form that the network was trained on."""
        return other_data.open_tested(self.after, self.split, self.inputs)

    @functools.cached_property
    def overlap(self) -> other_data.Overlap | None:
        """The tested examples that the run was trained or validated on, if that is allowed.

        Raise UserError if it is not.
        """
        before, after = self.before, self.after
        has_own_content = self.data.content_hash == self.own.protocol.get("data")
        has_own_data = has_own_content or other_data.has_same_source(before, after)
        is_trained = other_data.is_trained(before)
        if self.split == "all" and has_own_data and is_trained:
            raise UserError(
                "split=all: the run was trained on classes of this dataset; use split=test"
            )
        tested, trained = self.data.protocol("test"), self.own.protocol
        has_own_test = has_own_data and tested.get("classes") == trained.get("classes")
        has_own_splits = has_own_test and tested.get("split") == trained.get("split")
        if self.split == "train+test":
            if not (has_own_content and has_own_splits):
                raise UserError(
                    "split=train+test: mixes the classes that the run was trained on with those of "
                    "its test; requires the run's own dataset and split"
                )
            if after.episode.distractors:
                raise UserError("split=train+test: set episode.distractors=0")
        # Training classes of the run's own split are tested on purpose.
        is_own = has_own_test if self.split == "test" else has_own_splits
        if is_own or before.dataset == after.dataset or not is_trained:
            return None
        for one in other_data.lineage(before):
            own = other_data.open_own(one, after)
            if shared := other_data.check_overlap(one, after, own, self.data, self.split):
                return shared
        return None

    def run(self, statistics: str, **episode: Any) -> Run:
        """Build the run under the requested protocol.

        Raise UserError if tested examples were used for training or validation.
        """
        _ = self.overlap
        given = {word.partition("=")[0].lstrip("+") for word in self.overrides}
        if "dataset" in given and "way" not in episode:
            is_given = bool(given & {"episode", "episode.way"})
            way = other_data.fitting_way(self.after, self.data, self.split, is_given)
            episode = {**episode, "way": way}
        settings: Any = OmegaConf.merge(
            self.changed, {"statistics": statistics, "episode": episode}
        )
        if not self.overrides and not episode and self.split == "test":
            settings.engine = OmegaConf.merge(settings.engine, self._engine_of_run())
        after = check_config(settings)
        check_population(self.before, after.statistics)
        return build(after, self.split, is_restored=True, data=self.data)

    def _engine_of_run(self) -> dict[str, Any]:
        """Return engine settings that repeat the run's own test bit for bit, if possible here."""
        if not self.files.engine.exists():  # a run of an earlier version
            return {}
        choices = read_choices(self.files.engine)
        is_possible = (
            choices["threads"] <= (os.cpu_count() or 1)
            and choices.get("device") == device_of(self.before.device).type
        )
        return {**FREE_CHOICES, "choices": str(self.files.engine) if is_possible else None}

    def file(self, protocol_id: str, ending: str) -> Path:
        """Return an output file; its name contains how the adaptation differs."""
        name = "-".join([protocol_id, *self.variant]) + ending
        return self.files.evaluations / name

    def measure(
        self,
        run: Run,
        state: State,
        prefix: Path | None = None,
        steps: int | None = None,
        others: Sequence[tuple[Run, State]] = (),
    ) -> tuple[Result, Tensor]:
        """Test the run. See `metalearn.run.measure.measure`."""
        steps_done = run.config.train.steps
        progress = Progress(run.config, run.metric.name, open_console(), [], steps_done)
        environment = describe_environment(str(run.device))
        with progress.live():
            result, scores = measure(
                run, state, self.own.name, environment, prefix, steps, progress, others
            )
        result.evaluation = {
            "overrides": self.overrides,
            "variant": self.variant,
            "dataset": components.component(run.config.dataset, "dataset").__name__,
            **({"overlap": self.overlap.counts} if self.overlap else {}),
        }
        return result, scores


#: Groups of which a test may choose another one.
_GROUPS = ("dataset", "episode")


def _apply(stored: DictConfig, word: str) -> DictConfig:
    """Apply an override; raise UserError for an unknown setting or one that only training reads."""
    key = word.split("=")[0].lstrip("+~")
    if key in ("algo", "backbone"):
        raise UserError(f"{word}: a run is tested with what it was trained with; train another one")
    plain: Any = OmegaConf.to_container(stored)
    known = roles.roles(plain)
    changed = composition.apply_overrides(stored, [word])  # a mistyped key is reported as such
    if key in _GROUPS or roles.may_evaluate_with(key, known):
        return changed
    if key in known and (other := known[key].rule.get("in_testing")):
        raise UserError(
            f"{word}: only training reads this; did you mean {key.rpartition('.')[0]}.{other}?"
        )
    allowed = roles.names_of(known, roles.may_evaluate_with)
    named = dict.fromkeys(["algo", "dataset", "episode", *allowed])
    names = [name for name in named if not name.startswith(("algo.", "episode."))]
    raise UserError(
        f"{word}: a test cannot change how the run was trained; it may change {', '.join(names)}"
    )
