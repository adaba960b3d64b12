"""Compare methods: one row per method, one column per protocol, and paired tests."""

import dataclasses
import itertools
import json
from collections import defaultdict
from typing import Any

from metalearn.report import stats
from metalearn.report.measurements import Cell, Measurement
from metalearn.report.tables import format_difference, format_interval, format_value

#: Number of settings that distinguish methods of the same name in a label.
_LABEL_SETTINGS = 4

#: A method: its name, and its settings as text.
Method = tuple[str, str]


class Comparison:
    """Methods by protocols, for one metric.

    A method is all runs that differ only in their seed and in how they were tested.

    Args:
        measurements: At least one, all of the same metric.
    """

    def __init__(self, measurements: list[Measurement]) -> None:
        first = measurements[0].result
        self.metric, self._sign = first.metric, 1 if first.higher_is_better else -1
        self.methods: dict[Method, list[Measurement]] = defaultdict(list)
        for one in measurements:
            settings = json.dumps([one.settings, one.variant], sort_keys=True)
            self.methods[one.name, settings].append(one)
        self.labels = self._labels()
        self.protocols = {one.result.protocol_id: one for one in measurements}
        self.cells = {
            (method, protocol): Cell.of(group)
            for method, own in self.methods.items()
            for protocol in self.protocols
            if (group := [one for one in own if one.result.protocol_id == protocol])
        }

    def _labels(self) -> dict[Method, str]:
        """Return what distinguishes methods of the same name."""
        labels = {}
        for name in dict.fromkeys(name for name, _ in self.methods):
            own = {method: group[0] for method, group in self.methods.items() if method[0] == name}
            keys = {key for one in own.values() for key in one.settings}
            differing = [
                key
                for key in sorted(keys)
                if len({repr(one.settings.get(key)) for one in own.values()}) > 1
            ]
            for method, one in own.items():
                words = [f"{key}={one.settings.get(key)}" for key in differing]
                if (rest := len(words) - _LABEL_SETTINGS) > 0:
                    words = [*words[:_LABEL_SETTINGS], f"and {rest} more"]
                labels[method] = " ".join([*words, *([one.variant] if one.variant else [])])
        return labels

    def title(self, method: Method) -> str:
        """Return the name and label of a method."""
        return " ".join(part for part in (method[0], self.labels[method]) if part)

    def heading(self, protocol_id: str, separator: str = " ") -> str:
        """Return the heading of a protocol's column."""
        one = self.protocols[protocol_id]
        special = [one.source] if one.source else []
        episodes = {other.result.test.episodes for other in self.protocols.values()}
        if len(episodes) > 1:
            special.append(f"{one.result.test.episodes} episodes")
        statistics = one.result.protocol["statistics"]
        return separator.join([one.result.shape, statistics, *special, protocol_id])

    def rows(self, protocols: list[str], separator: str) -> list[dict[str, Any]]:
        """Return a row per method.

        Args:
            protocols: Identifiers of the columns.
            separator: Between the parts of a heading and of a cell.
        """
        rows = []
        for method, group in self.methods.items():
            seeds = {one.result.seed for one in group}
            runs = {one.folder: one for one in group}.values()
            row = {
                "algorithm": method[0],
                "setting": self.labels[method],
                "seeds": len(seeds),
                "minutes": f"{sum(one.minutes for one in runs) / len(runs):.1f}",
                "hardware": ", ".join(dict.fromkeys(one.hardware for one in runs)),
            }
            if not any(self.labels.values()):
                del row["setting"]
            for protocol in protocols:
                cell = self.cells.get((method, protocol))
                text = "" if cell is None else self._cell_text(cell, len(seeds), separator)
                row[self.heading(protocol, separator)] = text
            rows.append(row)
        return rows

    def _cell_text(self, cell: Cell, seeds: int, separator: str) -> str:
        parts = [format_interval(self.metric, cell.mean, cell.ci95)]
        if cell.seeds_ci95 is not None:
            parts.append(f"seeds ± {format_value(self.metric, cell.seeds_ci95)}")
        if len(cell.by_seed) < seeds:
            parts.append(f"{len(cell.by_seed)} of {seeds} seeds")
        return separator.join(parts)

    def notes(self) -> list[str]:
        """Return lines that explain the table and test differences for significance."""
        lines = ["± is the 95% interval over the shared episodes (Student's t)"]
        if any(cell.seeds_ci95 is not None for cell in self.cells.values()):
            lines[0] += "; seeds ± is the one over seeds, each seed one value"
        has_single_seeds = False
        for protocol in self.protocols:
            cells = {method: cell for (method, one), cell in self.cells.items() if one == protocol}
            if len(cells) > 1:
                more, is_single = self._differences(protocol, cells)
                lines += more
                has_single_seeds = has_single_seeds or is_single
        if has_single_seeds:
            lines.append(
                "with one seed, a significant difference is one of these trained weights; for a "
                "statement about the methods train several seeds"
            )
        return lines

    def _differences(self, protocol: str, cells: dict[Method, Cell]) -> tuple[list[str], bool]:
        """Test the differences to the best method, with p adjusted for all pairs.

        Returns:
            The lines, and whether a method of a pair has a single seed.
        """
        pairs = list(itertools.combinations(cells, 2))
        differences = {
            (a, b): stats.paired_difference(cells[a].scores, cells[b].scores) for a, b in pairs
        }
        p_values = stats.holm([one.p_value for one in differences.values()])
        adjusted = dict(zip(pairs, p_values, strict=True))
        by_seeds = {
            (a, b): stats.unpaired_p_value(cells[a].by_seed, cells[b].by_seed)
            for a, b in pairs
            if len(cells[a].by_seed) > 1 and len(cells[b].by_seed) > 1
        }
        by_seeds = dict(zip(by_seeds, stats.holm(list(by_seeds.values())), strict=True))
        best = max(cells, key=lambda method: self._sign * cells[method].mean)
        plural = "s" if len(pairs) > 1 else ""
        lines = [
            f"{self.heading(protocol)}: best is {self.title(best)}; paired differences to it, "
            f"p adjusted for {len(pairs)} comparison{plural} (Holm):"
        ]
        has_single_seeds = False
        for pair in (pair for pair in pairs if best in pair):
            other = pair[1] if pair[0] == best else pair[0]
            mean = differences[pair].mean * (-1 if other == pair[1] else 1)
            difference = dataclasses.replace(differences[pair], mean=mean, p_value=adjusted[pair])
            text = f"  {self.title(other)}: {format_difference(self.metric, difference)}"
            if pair in by_seeds:
                text += f", over seeds p = {by_seeds[pair]:.3f}"
            has_single_seeds = has_single_seeds or pair not in by_seeds
            is_significant = max(adjusted[pair], by_seeds.get(pair, 0.0)) < 0.05
            lines.append(f"{text}: {'significant' if is_significant else 'not significant'}")
        return lines, has_single_seeds

    def panels(self) -> dict[str, list[tuple[str, float, float]]]:
        """Return for each protocol the methods with the wider of their two intervals."""
        return {
            self.heading(protocol): [
                (self.title(method), cell.mean, max(cell.ci95, cell.seeds_ci95 or 0))
                for (method, one), cell in self.cells.items()
                if one == protocol
            ]
            for protocol in self.protocols
        }
