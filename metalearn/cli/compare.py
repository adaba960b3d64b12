"""`metalearn compare`: one table over runs, in which only equal protocols share a column, and what differs for sure."""

import csv
import dataclasses
import datetime
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor

from metalearn.config import checking, roles
from metalearn.report import stats, tables
from metalearn.report.console import print_line
from metalearn.report.plots import draw_comparison
from metalearn.report.tables import shown, shown_interval
from metalearn.run.measure import read_scores
from metalearn.run.train import CONFIG_FILE, ERROR_FILE, RESULT_FILE
from metalearn.system.errors import UserError
from metalearn.tasks.family import METRICS

_SHOWN_SETTINGS = 4
#: Characters of the console that a column of figures takes, and all that stands left of them.
_COLUMN_WIDTH, _LEFT_WIDTH = 20, 84


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One test of one run. variant: adaptation other than in the run's own test; minutes: of the training."""

    folder: Path
    name: str
    settings: dict[str, Any]
    seed: int
    score: str
    mean: float
    ci95: float
    protocol: dict[str, Any]
    protocol_id: str
    episodes: int
    where: str
    variant: str
    minutes: float
    hardware: str
    scores: Tensor


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method gave under one protocol.

    scores: [E], averaged over seeds; by_seed: the mean of each seed, over the runs that repeat it.
    """

    mean: float
    ci95: float
    by_seed: list[float]
    scores: Tensor

    @property
    def seeds_ci95(self) -> float | None:
        """Half-width of the interval over seeds, where there are several."""
        return stats.over_seeds(self.by_seed).ci95 if len(self.by_seed) > 1 else None


def compare(folders: list[Path], out: Path | None, console: Console) -> None:
    """Prints the table; writes comparison.md, .csv and .png.

    Args: folders: of runs, or folders that hold such folders; out: where to write; None: the folder itself where
      there is one, or else `outputs/compare/<time>`.
    Raises: UserError where no finished run lies there.
    """
    runs = sorted({path for folder in folders for path in _runs(folder)})
    if not runs:
        raise UserError(f"{folders[0]}: no finished run ({RESULT_FILE}) there or below")
    measurements: list[Measurement] = []
    unreadable: list[str] = []
    for run in runs:
        try:
            measurements += _measurements(run)
        except UserError as error:
            unreadable.append(str(error))
    if not measurements:
        raise UserError(unreadable[0])
    if out is None:
        time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        out = folders[0] if len(folders) == 1 else Path("outputs/compare") / time
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "comparison.csv", measurements)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); name another with out="
        ) from None
    text = []
    files = ["comparison.md", "comparison.csv"]
    for number, score in enumerate(dict.fromkeys(found.score for found in measurements)):
        table = _Table([found for found in measurements if found.score == score], score)
        protocols = list(table.protocols)
        fit = max(1, (console.width - _LEFT_WIDTH) // _COLUMN_WIDTH)
        for first in range(
            0, len(protocols), fit
        ):  # as many columns side by side as the console can show
            console.print(tables.result_table(table.rows(protocols[first : first + fit], "\n")))
        for line in table.notes():
            print_line(console, f"  {line}")
        text += [
            *tables.markdown_table(table.rows(protocols, " ")),
            "",
            *(f"- {line}" for line in table.notes()),
            "",
        ]
        files.append(f"comparison_{score}.png" if number else "comparison.png")
        draw_comparison(table.panels(), score, out / files[-1])
    if line := _sampler_line(measurements):
        print_line(console, f"  {line}")
        text += [f"- {line}", ""]
    (out / "comparison.md").write_text("\n".join(text))
    for line in unreadable:
        print_line(console, f"  left out: {line}")
    for folder in _unfinished(folders):
        print_line(console, f"  left out: {folder} has no result; its run failed or has not ended")
    for name in files:
        print_line(console, f"  {out / name}")


def _sampler_line(measurements: list[Measurement]) -> str:
    """Return a line where runs were tested on episodes of different versions of the sampler, or ""."""
    runs: dict[int, set[str]] = defaultdict(set)
    for one in measurements:
        runs[int(one.protocol.get("sampler", 1))].add(str(one.folder))
    if len(runs) < 2:
        return ""
    parts = [
        f"version {version}: {', '.join(sorted(folders)[:3])}"
        for version, folders in sorted(runs.items())
    ]
    return (
        f"tested on episodes of different versions of the sampler, which are different measurements ({'; '.join(parts)}); "
        "metalearn evaluate tests an old run on the episodes of this version"
    )


def _runs(folder: Path) -> Iterator[Path]:
    if (folder / RESULT_FILE).is_file():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _runs(path)


def _unfinished(folders: list[Path]) -> list[Path]:
    """Folders of runs without a result."""
    started = {
        path.parent
        for folder in folders
        for name in (CONFIG_FILE, ERROR_FILE)
        for path in folder.rglob(name)
    }
    return sorted(folder for folder in started if not (folder / RESULT_FILE).exists())


def _measurements(folder: Path) -> Iterator[Measurement]:
    """The run's own test, and its evaluations under other protocols or with other adaptation."""
    try:
        own = json.loads((folder / RESULT_FILE).read_text())
        with (folder / CONFIG_FILE).open() as stream:
            # The C parser, because a multirun may have a thousand of these.
            settings = yaml.load(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        settings = _identity(settings)
        tests = [(own, folder / "test_scores.csv", "")]
        for path in sorted((folder / "evaluations").glob("*.json")):
            found = json.loads(path.read_text())
            variant = path.stem.partition("-")[2]
            if variant or found["protocol_id"] != own["protocol_id"]:
                tests.append((found, path.with_name(f"{path.stem}_scores.csv"), variant))
        for found, scores_file, variant in tests:
            (score, estimate), *_ = found["test"].items()
            split = found.get("split", "test")
            where = [] if split == "test" else [f"split {split}"]
            if "dataset" in found and found["protocol"]["data"] != own["protocol"]["data"]:
                where.append(found["dataset"])
            scores = read_scores(scores_file)
            if len(scores) != estimate["episodes"]:
                raise UserError(
                    f"{scores_file} has {len(scores)} scores, not {estimate['episodes']}"
                )
            if abs(scores.mean().item() - estimate["mean"]) > 1e-4 * max(
                1.0, abs(estimate["mean"])
            ):
                raise UserError(
                    f"{scores_file} has mean {scores.mean().item():.4f}, the result {estimate['mean']:.4f}"
                )
            yield Measurement(
                folder=folder, name=own["name"], settings=settings, seed=own["seed"], score=score,
                mean=estimate["mean"], ci95=estimate["ci95"], protocol=found["protocol"],
                protocol_id=found["protocol_id"], episodes=estimate["episodes"], where=" ".join(where), variant=variant, minutes=own["seconds"] / 60,
                hardware=own["environment"]["hardware"], scores=scores,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder} is not a readable run ({type(error).__name__}: {error})"
        ) from None


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that tell a run's method from others, by dotted name, those that are newer than the run included."""
    complete = checking.complete(settings, is_strict=False)
    described = roles.roles(complete, is_strict=False)
    return {
        key: value for key, value in _leaves(complete) if roles.tells_methods_apart(key, described)
    }


def _leaves(node: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


class _Table:
    """Methods by protocols. A method is all runs that differ in nothing but their seed and how they were tested."""

    def __init__(self, measurements: list[Measurement], score: str) -> None:
        self.score = score
        self.methods: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
        for found in measurements:
            self.methods[
                found.name, json.dumps([found.settings, found.variant], sort_keys=True)
            ].append(found)
        self.labels = self._labels()
        self.protocols = {found.protocol_id: found.protocol for found in measurements}
        self.where = {found.protocol_id: found.where for found in measurements}
        self.cells = {
            (method, protocol): _cell(group)
            for method, found in self.methods.items()
            for protocol in self.protocols
            if (group := [one for one in found if one.protocol_id == protocol])
        }

    def _labels(self) -> dict[tuple[str, str], str]:
        """What tells the methods of one name apart."""
        labels = {}
        for name in dict.fromkeys(name for name, _ in self.methods):
            own = {method: found[0] for method, found in self.methods.items() if method[0] == name}
            keys = {key for one in own.values() for key in one.settings}
            differing = [
                key
                for key in sorted(keys)
                if len({repr(one.settings.get(key)) for one in own.values()}) > 1
            ]
            for method, one in own.items():
                words = [f"{key}={one.settings.get(key)}" for key in differing]
                if len(words) > _SHOWN_SETTINGS:
                    words = [*words[:_SHOWN_SETTINGS], f"and {len(words) - _SHOWN_SETTINGS} more"]
                labels[method] = " ".join([*words, *([one.variant] if one.variant else [])])
        return labels

    def heading(self, protocol_id: str, separator: str = " ") -> str:
        protocol = self.protocols[protocol_id]
        shape = f"{protocol['way']}w {protocol['shot']}s {protocol['query']}q"
        special = [self.where[protocol_id]] if self.where[protocol_id] else []
        if len({found["episodes"] for found in self.protocols.values()}) > 1:
            special.append(f"{protocol['episodes']} episodes")
        return separator.join([shape, protocol["statistics"], *special, protocol_id])

    def rows(self, protocols: list[str], separator: str) -> list[dict[str, Any]]:
        """A line a method, a column a protocol. separator: between the parts of a heading and of a cell."""
        rows = []
        for method, found in self.methods.items():
            seeds = {one.seed for one in found}
            trained = {one.folder: one for one in found}.values()
            row = {
                "algorithm": method[0],
                "setting": self.labels[method],
                "seeds": len(seeds),
                "minutes": f"{sum(one.minutes for one in trained) / len(trained):.1f}",
                "hardware": ", ".join(dict.fromkeys(one.hardware for one in trained)),
            }
            if not any(self.labels.values()):
                del row["setting"]
            for protocol in protocols:
                cell = self.cells.get((method, protocol))
                row[self.heading(protocol, separator)] = (
                    "" if cell is None else self._shown(cell, len(seeds), separator)
                )
            rows.append(row)
        return rows

    def _shown(self, cell: Cell, seeds: int, separator: str) -> str:
        parts = [shown_interval(self.score, cell.mean, cell.ci95)]
        if cell.seeds_ci95 is not None:
            parts.append(f"seeds ± {shown(self.score, cell.seeds_ci95)}")
        if len(cell.by_seed) < seeds:
            parts.append(f"{len(cell.by_seed)} of {seeds} seeds")
        return separator.join(parts)

    def notes(self) -> list[str]:
        """How to read it, and which differences are more than chance."""
        lines = [
            "± is the 95% interval over the shared episodes (Student's t), of each figure by itself"
        ]
        if any(cell.seeds_ci95 is not None for cell in self.cells.values()):
            lines[0] += "; beside it the one over seeds, each seed one value"
        higher = next(
            (one.higher_is_better for one in METRICS.values() if one.name == self.score), True
        )
        alone = False
        for protocol in self.protocols:
            found = {
                method: cell for (method, other), cell in self.cells.items() if other == protocol
            }
            pairs = list(itertools.combinations(found, 2))
            if not pairs:
                continue
            differences = {
                pair: stats.paired_difference(found[pair[0]].scores, found[pair[1]].scores)
                for pair in pairs
            }
            adjusted = dict(
                zip(pairs, stats.holm([one.p_value for one in differences.values()]), strict=True)
            )
            over_seeds = {
                pair: stats.unpaired_p_value(*(found[one].by_seed for one in pair))
                for pair in pairs
                if all(len(found[one].by_seed) > 1 for one in pair)
            }
            over_seeds = dict(zip(over_seeds, stats.holm(list(over_seeds.values())), strict=True))
            best = max(found, key=lambda method: found[method].mean * (1 if higher else -1))
            lines.append(
                f"{self.heading(protocol)}: best is {self._called(best)}; paired differences to it, p adjusted for "
                f"{len(pairs)} comparison{'s' if len(pairs) > 1 else ''} (Holm):"
            )
            for pair in pairs:
                if best not in pair:
                    continue
                other = pair[1] if pair[0] == best else pair[0]
                difference = dataclasses.asdict(differences[pair]) | {"p_value": adjusted[pair]}
                if other == pair[1]:
                    difference["mean"] = -difference["mean"]
                text = f"  {self._called(other)}: {tables.shown_difference(self.score, difference)}"
                if pair in over_seeds:
                    text += f", over seeds p = {over_seeds[pair]:.3f}"
                significant = max(adjusted[pair], over_seeds.get(pair, 0.0)) < 0.05
                alone = alone or pair not in over_seeds
                lines.append(f"{text}: {'significant' if significant else 'not significant'}")
        if alone:
            lines.append(
                "with one seed on a side, a significant difference is one of these trained weights; "
                "for a statement about the methods train several seeds"
            )
        return lines

    def _called(self, method: tuple[str, str]) -> str:
        return " ".join(part for part in (method[0], self.labels[method]) if part)

    def panels(self) -> dict[str, list[tuple[str, float, float]]]:
        """For the figure: of each protocol the methods, with the wider of the two intervals."""
        return {
            self.heading(protocol): [
                (self._called(method), cell.mean, max(cell.ci95, cell.seeds_ci95 or 0))
                for (method, other), cell in self.cells.items()
                if other == protocol
            ]
            for protocol in self.protocols
        }


def _cell(found: list[Measurement]) -> Cell:
    by_seed: dict[int, list[Tensor]] = defaultdict(list)
    for one in found:
        by_seed[one.seed].append(one.scores)
    means = [
        torch.stack(scores).mean(0) for scores in by_seed.values()
    ]  # a seed that was run twice counts once
    scores = torch.stack(means).mean(0)
    over_episodes = stats.estimate(scores)
    return Cell(
        over_episodes.mean, over_episodes.ci95, [mean.mean().item() for mean in means], scores
    )


def _write_csv(path: Path, measurements: list[Measurement]) -> None:
    """One line a measurement, for other programs."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["run", "algorithm", "variant", "seed", "protocol_id", "way", "shot", "query", "statistics", "score", "mean",
             "ci95", "minutes", "hardware"]
        )  # fmt: skip
        for one in measurements:
            protocol = one.protocol
            writer.writerow(
                [one.folder, one.name, one.variant, one.seed, one.protocol_id, protocol["way"], protocol["shot"],
                 protocol["query"], protocol["statistics"], one.score, one.mean, one.ci95, f"{one.minutes:.2f}",
                 one.hardware]
            )  # fmt: skip
