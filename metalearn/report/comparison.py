"""Compare methods: one row per method, one column per protocol, and paired tests."""

import dataclasses
import itertools
import json
from collections import defaultdict
from typing import Any

from metalearn.report import stats, tables
from metalearn.report.measurements import Cell, Measurement
from metalearn.report.tables import format_difference, format_interval, format_value

#: Number of settings that distinguish methods of the same name in a label.
_LABEL_SETTINGS = 4

#: Width of the column of methods from which a column per protocol is readable.
_METHOD_WIDTH = 24

#: A method: its name, and its settings as text.
Method = tuple[str, str]


class Comparison:
    """Methods by protocols, of measurements of one metric.

    A method is all runs that differ only in their seed and in how they were tested.
    """

    def __init__(self, measurements: list[Measurement]) -> None:
        self.metric, self._sign = measurements[0].result.metric, measurements[0].result.sign
        self.methods: dict[Method, list[Measurement]] = defaultdict(list)
        for one in measurements:
            settings = json.dumps([one.settings, one.variant], sort_keys=True)
            self.methods[one.name, settings].append(one)
        self.labels = self._labels()
        self.hardware = list(dict.fromkeys(one.hardware for one in measurements))
        ordered = sorted(measurements, key=lambda one: (*_order(one), str(one.dataset)))
        self.protocols = {one.result.protocol_id: one for one in ordered}
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

    def heading(self, protocol_id: str, separator: str = ", ") -> str:
        """Return what a protocol measures, with what distinguishes it from similar ones."""
        one = self.protocols[protocol_id]
        same = [other for other in self.protocols.values() if _order(other) == _order(one)]
        special = [
            f"{key}={value}"
            for key, value in one.dataset.items()
            if any(str(other.dataset.get(key, value)) != str(value) for other in same)
        ]
        if len({other.result.test.episodes for other in same}) > 1:
            special.append(f"{one.result.test.episodes} episodes")
        result = one.result
        parts = [result.shape, result.statistics, *special, protocol_id]
        split = [] if result.split == "test" else [f"{result.split} classes"]
        return separator.join([one.data, *split, *parts])

    def rows(self, width: int, separator: str) -> list[dict[str, Any]]:
        """Return a row per method and a column per protocol, or a row for each of both.

        The latter if the methods share few protocols, or if the columns do not fit into `width`
        characters. `separator` is between the parts of a heading and of a cell.
        """
        facts = {method: self._facts(group) for method, group in self.methods.items()}
        texts = {key: self._cell_text(*key, separator) for key in self.cells}
        wide = [
            {"method": self.title(method), **facts[method]}
            | {self.heading(one, separator): texts.get((method, one), "") for one in self.protocols}
            for method in self.methods
        ]
        are_shared = 2 * len(self.cells) > len(self.methods) * len(self.protocols)
        if are_shared and tables.least_width(wide, _METHOD_WIDTH) <= width:
            return wide
        return [
            {"test": self.heading(one), "method": self.title(method),
             self.metric: texts[method, one], **facts[method]}
            for one in self.protocols
            for method in self.methods
            if (method, one) in texts
        ]  # fmt: skip

    def _facts(self, measurements: list[Measurement]) -> dict[str, Any]:
        """Return columns about the training of a method: seeds, minutes, hardware if it differs."""
        runs = {one.folder: one for one in measurements}.values()
        facts = {
            "seeds": len({one.result.seed for one in runs}),
            "minutes": f"{sum(one.minutes for one in runs) / len(runs):.1f}",
        }
        if len(self.hardware) > 1:
            facts["hardware"] = ", ".join(dict.fromkeys(one.hardware for one in runs))
        return facts

    def _cell_text(self, method: Method, protocol_id: str, separator: str) -> str:
        cell = self.cells[method, protocol_id]
        parts = [format_interval(self.metric, cell.mean, cell.ci95)]
        if cell.seeds_ci95 is not None:
            parts.append(f"seeds ± {format_value(self.metric, cell.seeds_ci95)}")
        if len(cell.by_seed) < (seeds := len({one.result.seed for one in self.methods[method]})):
            parts.append(f"{len(cell.by_seed)} of {seeds} seeds")
        return separator.join(parts)

    def notes(self) -> list[str]:
        """Return lines that explain the table and test differences for significance."""
        better = "higher" if self._sign > 0 else "lower"
        lines = [
            f"{self.metric}, {better} is better; ± is the 95% interval over the shared episodes "
            "(Student's t)"
        ]
        if len(self.hardware) == 1:
            lines.append(f"trained on {self.hardware[0]}")
        if any(cell.seeds_ci95 is not None for cell in self.cells.values()):
            lines[0] += "; seeds ± is the one over seeds, each seed one value"
        has_single_seeds = False
        for protocol in self.protocols:
            cells = {method: cell for (method, one), cell in self.cells.items() if one == protocol}
            if len(cells) > 1:
                lines += self._differences(protocol, cells)
                has_single_seeds |= any(len(cell.by_seed) < 2 for cell in cells.values())
        if has_single_seeds:
            lines.append(
                "with one seed, a significant difference is one of these trained weights; for a "
                "statement about the methods train several seeds"
            )
        return lines

    def _differences(self, protocol: str, cells: dict[Method, Cell]) -> list[str]:
        """Test the differences to the best method, with p adjusted for all pairs."""
        best = max(cells, key=lambda method: self._sign * cells[method].mean)
        pairs = list(itertools.combinations(cells, 2))
        # The best method is the second of its pairs.
        pairs = [(b, a) if a == best else (a, b) for a, b in pairs]
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
        plural = "s" if len(pairs) > 1 else ""
        lines = [
            f"{self.heading(protocol)}: best is {self.title(best)}; paired differences to it, "
            f"p adjusted for {len(pairs)} comparison{plural} (Holm):"
        ]
        for pair in (pair for pair in pairs if pair[1] == best):
            difference = dataclasses.replace(differences[pair], p_value=adjusted[pair])
            text = f"  {self.title(pair[0])}: {format_difference(self.metric, difference)}"
            if pair in by_seeds:
                text += f", over seeds p = {by_seeds[pair]:.3f}"
            is_significant = max(adjusted[pair], by_seeds.get(pair, 0.0)) < 0.05
            lines.append(f"{text}: {'significant' if is_significant else 'not significant'}")
        return lines

    def summary(self) -> list[dict[str, Any]]:
        """Return a row for each method and protocol, as numbers."""
        return [
            {
                "method": self.title(method), "metric": self.metric, "protocol_id": protocol,
                "test": self.heading(protocol), "mean": cell.mean, "ci95": cell.ci95,
                "seeds": len(cell.by_seed), "seeds_ci95": cell.seeds_ci95,
            }
            for (method, protocol), cell in self.cells.items()
        ]  # fmt: skip

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


def _order(one: Measurement) -> tuple[str, ...]:
    """Return what columns are sorted by: dataset and split, way, shot, queries, statistics."""
    protocol = one.result.protocol
    numbers = (f"{protocol[name]!s:>9}" for name in ("way", "shot", "query"))
    return (one.data, one.result.split, *numbers, str(protocol["statistics"]))
