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

from metalearn import report, stats
from metalearn.errors import UserError
from metalearn.figures import draw_comparison, shown, shown_interval
from metalearn.measure import read_scores
from metalearn.verbs.train import CONFIG_FILE, RESULT_FILE

#: Settings that make no other method: two runs that differ in these alone are one method, seen twice.
_NEUTRAL = (
    "seed", "device", "data_dir", "cache_dir", "logger", "engine", "checkpoint", "reproduction", "train.log_every",
    "test", "episode_seed", "episode.query",
)  # fmt: skip
_SHOWN_SETTINGS = 4
#: Characters of the console that a column of figures takes, and all that stands left of them.
_COLUMN_WIDTH, _LEFT_WIDTH = 20, 84


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One test of one run."""

    folder: Path
    name: str
    settings: dict[str, Any]
    seed: int
    score: str
    mean: float
    ci95: float
    protocol: dict[str, Any]
    protocol_id: str
    variant: str
    minutes: float
    hardware: str
    scores_file: Path


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one method gave under one protocol, over its seeds. scores: [E], averaged over seeds."""

    mean: float
    ci95: float
    seeds: int
    seeds_ci95: float | None
    scores: Tensor


def compare(folders: list[Path], out: Path | None, console: Console) -> None:
    """Prints the table; writes comparison.md, .csv and .png.

    Args: folders: of runs, or folders that hold such folders; out: where to write; None: the folder itself where
      there is one, or else `outputs/compare/<time>`.
    Raises: UserError where no finished run lies there.
    """
    runs = sorted({path for folder in folders for path in _runs(folder)})
    if not runs:
        raise UserError(f"{folders[0]}: no finished run ({RESULT_FILE}) there or below")
    measurements = [found for run in runs for found in _measurements(run)]
    if out is None:
        time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        out = folders[0] if len(folders) == 1 else Path("outputs/compare") / time
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_csv(out / "comparison.csv", measurements)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); name another with out=") from None
    text = []
    files = ["comparison.md", "comparison.csv"]
    for number, score in enumerate(dict.fromkeys(found.score for found in measurements)):
        table = _Table([found for found in measurements if found.score == score], score)
        protocols = list(table.protocols)
        fit = max(1, (console.width - _LEFT_WIDTH) // _COLUMN_WIDTH)
        for first in range(0, len(protocols), fit):  # as many columns side by side as the console can show
            console.print(report.result_table(table.rows(protocols[first : first + fit], "\n")))
        for line in table.notes():
            console.print(f"  {line}", highlight=False, soft_wrap=True)
        text += [*_markdown(table.rows(protocols, " ")), "", *(f"- {line}" for line in table.notes()), ""]
        files.append(f"comparison_{score}.png" if number else "comparison.png")
        draw_comparison(table.panels(), score, out / files[-1])
    (out / "comparison.md").write_text("\n".join(text))
    for name in files:
        console.print(f"  {out / name}", highlight=False, soft_wrap=True)


def _runs(folder: Path) -> Iterator[Path]:
    if (folder / RESULT_FILE).is_file():
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _runs(path)


def _measurements(folder: Path) -> Iterator[Measurement]:
    """The run's own test, and its evaluations under other protocols or with other adaptation."""
    try:
        own = json.loads((folder / RESULT_FILE).read_text())
        with (folder / CONFIG_FILE).open() as stream:
            # The C parser, because a multirun may have a thousand of these.
            settings = yaml.load(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        tests = [(own, folder / "test_scores.csv", "")]
        for path in sorted((folder / "evaluations").glob("*.json")):
            found = json.loads(path.read_text())
            variant = path.stem.partition("-")[2]
            if variant or found["protocol_id"] != own["protocol_id"]:
                tests.append((found, path.with_name(f"{path.stem}_scores.csv"), variant))
        for found, scores_file, variant in tests:
            score, estimate = next(iter(found["test"].items()))
            yield Measurement(
                folder=folder, name=own["name"], settings=dict(_leaves(settings)), seed=own["seed"], score=score,
                mean=estimate["mean"], ci95=estimate["ci95"], protocol=found["protocol"],
                protocol_id=found["protocol_id"], variant=variant, minutes=own["seconds"] / 60,
                hardware=own["environment"]["hardware"], scores_file=scores_file,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{folder} is not a readable run ({type(error).__name__}: {error})") from None


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
            kept = {key: value for key, value in found.settings.items() if not _neutral(key)}
            self.methods[found.name, json.dumps([kept, found.variant], sort_keys=True)].append(found)
        self.labels = self._labels()
        self.protocols = {found.protocol_id: found.protocol for found in measurements}
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
            keys = {key for one in own.values() for key in one.settings if not _neutral(key)}
            differing = [key for key in sorted(keys) if len({repr(one.settings.get(key)) for one in own.values()}) > 1]
            for method, one in own.items():
                words = [f"{key}={one.settings.get(key)}" for key in differing]
                if len(words) > _SHOWN_SETTINGS:
                    words = [*words[:_SHOWN_SETTINGS], f"and {len(words) - _SHOWN_SETTINGS} more"]
                labels[method] = " ".join([*words, *([one.variant] if one.variant else [])])
        return labels

    def heading(self, protocol_id: str, separator: str = " ") -> str:
        protocol = self.protocols[protocol_id]
        shape = f"{protocol['way']}w {protocol['shot']}s {protocol['query']}q"
        return separator.join([shape, protocol["statistics"], protocol_id])

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
        if cell.seeds < seeds:
            parts.append(f"{cell.seeds} of {seeds} seeds")
        return separator.join(parts)

    def notes(self) -> list[str]:
        """How to read it, and which differences are more than chance."""
        lines = ["± is the 95% interval over the shared test episodes (Student's t)"]
        if any(cell.seeds_ci95 is not None for cell in self.cells.values()):
            lines[0] += "; beside it the one over seeds, each seed one value"
        higher = self.score == "accuracy"
        for protocol in self.protocols:
            found = {method: cell for (method, other), cell in self.cells.items() if other == protocol}
            pairs = list(itertools.combinations(found, 2))
            if not pairs:
                continue
            differences = {
                pair: stats.paired_difference(found[pair[0]].scores, found[pair[1]].scores) for pair in pairs
            }
            adjusted = dict(zip(pairs, stats.holm([one.p_value for one in differences.values()]), strict=True))
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
                verdict = "significant" if adjusted[pair] < 0.05 else "not significant"
                lines.append(f"  {self._called(other)}: {report.shown_difference(self.score, difference)}, {verdict}")
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


def _neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _NEUTRAL)


def _cell(found: list[Measurement]) -> Cell:
    scores = torch.stack([read_scores(one.scores_file) for one in found]).mean(0)
    over_episodes = stats.estimate(scores)
    seeds = {one.seed: one.mean for one in found}
    over_seeds = stats.over_seeds(list(seeds.values())).ci95 if len(seeds) > 1 else None
    return Cell(over_episodes.mean, over_episodes.ci95, len(seeds), over_seeds, scores)


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


def _markdown(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(rows[0])
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows),
    ]
