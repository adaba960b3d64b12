"""A requested test of a finished run: what it may change, and the run under its protocol."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metalearn.config import components, composition, paths, roles
from metalearn.config.checking import check_config
from metalearn.config.schema import RunConfig
from metalearn.report.console import open_console
from metalearn.report.environment import describe_environment
from metalearn.report.folder import RunFolder
from metalearn.report.progress import Progress
from metalearn.report.result import Result
from metalearn.run import checkpoint
from metalearn.run.build import Run, build
from metalearn.run.engines import FREE_CHOICES, read_choices
from metalearn.run.measure import measure
from metalearn.run.pairings import check_population, inductive_counterpart, target_name
from metalearn.run.parts import algorithm_of, data_folder, device_of
from metalearn.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Request:
    """A finished run and the requested test.

    Attributes:
        files: The run folder.
        own: The result of the run.
        before: The run's configuration.
        changed: The configuration of the test.
        variant: Settings of the adaptation that differ from the run's own test.
        overrides: The given changes.
        split: The split whose classes are tested.
    """

    files: RunFolder
    own: Result
    before: RunConfig
    changed: DictConfig
    variant: list[str]
    overrides: list[str]
    split: str

    @staticmethod
    def of(folder: Path, overrides: list[str], split: str) -> "Request":
        """Return the request; raise UserError if the run is not finished or cannot be so tested."""
        files = RunFolder(folder)
        if not files.is_finished:
            raise UserError(
                f"{folder}: not finished; to finish it: metalearn resume {folder}"
                if files.is_started
                else f"{folder}: no run there; name the folder of a finished run"
            )
        own = files.read_result()
        stored = composition.load_config(folder)
        stored.engine.choices = None  # the training's; the file may be gone
        # Groups first, because the others may set what a chosen dataset has.
        changed = stored
        for word in sorted(overrides, key=lambda word: word.partition("=")[0] not in _GROUPS):
            changed = _apply(changed, word)
        paths.make_absolute(changed, overrides, data_folder(check_config(changed)))
        before, after = check_config(stored), check_config(changed)
        old, new = (
            components.component(settings.dataset, "dataset").target for settings in (before, after)
        )
        if old != new:
            raise UserError(
                f"dataset: the run learned {target_name(old)}, but this dataset has "
                f"{target_name(new)}"
            )
        has_fixed_way = algorithm_of(after, is_restored=True).fixed_way
        if has_fixed_way and after.episode.way != before.episode.way:
            raise UserError(
                f"episode.way={after.episode.way}: the run distinguishes {before.episode.way} "
                "classes, the number of ways is part of its weights; train with that number"
            )
        variant = [
            f"{key}={value}"
            for key, value in sorted(after.algo.items())
            if before.algo[key] != value
        ]
        if after.engine.precision != before.engine.precision:
            variant.append(f"precision={after.engine.precision}")
        return Request(files, own, before, changed, variant, overrides, split)

    @property
    def statistics(self) -> list[str]:
        """The requested statistics, then their counterpart if the backbone normalises."""
        after = check_config(self.changed)
        backbone = algorithm_of(after, is_restored=True).backbone
        if not backbone.normalises or backbone.is_external:
            return [after.statistics]
        return [after.statistics, inductive_counterpart(self.before, after.statistics)]

    def run(self, statistics: str, **episode: int) -> Run:
        """Build the run under the requested protocol.

        Raise UserError if tested classes were used for training or validation.
        """
        settings: Any = OmegaConf.merge(
            self.changed, {"statistics": statistics, "episode": episode}
        )
        if not self.overrides and not episode and self.split == "test":
            settings.engine = OmegaConf.merge(settings.engine, self._engine_of_run())
        after, before = check_config(settings), self.before
        check_population(before, after.statistics)
        channels = checkpoint.channels(self.files.best)
        run = build(after, self.split, is_restored=True, channels=channels)
        same_source = all(
            before.dataset.get(key) == after.dataset.get(key) for key in ("_target_", "path")
        )
        has_own_data = same_source or run.protocol["data"] == self.own.protocol.get("data")
        if self.split == "all" and has_own_data:
            raise UserError(
                "split=all: the run was trained on classes of this dataset; use split=test"
            )
        if self.split == "test" and same_source and before.dataset != after.dataset:
            own = dataclasses.replace(after, dataset=before.dataset, episode=before.episode)
            names = build(own, self.split, is_restored=True).class_names
            used = {*names["train"], *names["val"]}
            if shared := sorted(used & set(run.class_names[self.split])):
                raise UserError(
                    f"class '{shared[0]}' and {len(shared) - 1} others of this test split were "
                    "trained or validated on; keep the split of the run"
                )
        return run

    def _engine_of_run(self) -> dict[str, Any]:
        """Return engine settings that repeat the run's own test bit for bit, if possible here."""
        free = {**FREE_CHOICES, "choices": None}
        if not self.files.engine.exists():  # a run of an earlier version
            return {}
        choices = read_choices(self.files.engine)
        is_possible = (
            choices["threads"] <= (os.cpu_count() or 1)
            and choices.get("device") == device_of(self.before.device).type
        )
        return {**free, "choices": str(self.files.engine)} if is_possible else free

    def file(self, protocol_id: str, ending: str) -> Path:
        """Return an output file; its name contains how the adaptation differs."""
        name = "-".join([protocol_id, *self.variant]) + ending
        return self.files.evaluations / name

    def measure(
        self, run: Run, state: Any, prefix: Path | None = None, steps: int | None = None
    ) -> tuple[Result, Tensor]:
        """Test the run. See `metalearn.run.measure.measure`."""
        environment = describe_environment(str(run.device))
        score, steps_done = run.metric.name, run.config.train.steps
        progress = Progress(run.config, score, open_console(), [], steps_done)
        with progress.live():
            result, scores = measure(
                run, state, self.own.name, environment, prefix, steps, progress
            )
        result.evaluation = {
            "overrides": self.overrides,
            "variant": self.variant,
            "dataset": components.component(run.config.dataset, "dataset").__name__,
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
    allowed = dict.fromkeys(
        ["algo", "dataset", "episode", *roles.names_of(known, roles.may_evaluate_with)]
    )
    names = [name for name in allowed if not name.startswith(("algo.", "episode."))]
    raise UserError(
        f"{word}: a test cannot change how the run was trained; it may change {', '.join(names)}"
    )
