"""Compare runs in one table, with tests of significance."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, visible, writing

HELP = """metalearn compare <folder> … [out=<folder>] [--json]

Prints one table over runs, their evaluations, and the runs of multirun folders. Only results of
equal protocols share a column; runs that differ only in their seed share a row. Columns are in the
order of dataset, split, way, shot, queries and statistics. Runs that share few protocols, and
tables that are too wide, have a row for each protocol and method instead. Differences are tested on
the shared episodes. Writes comparison.md, .csv and .png into `out`; by default into the folder if
only one is given, else into outputs/compare/<time>. --json prints one JSON document: measurements,
methods under each protocol, notes, runs left out, files; everything else goes to standard error.

  metalearn compare outputs/multirun/<time>
  metalearn compare outputs/maml-omniglot/<time> outputs/protonet-omniglot/<time>
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("{folder}", "out={folder}", "--json")

#: Characters of a line of comparison.md, beyond which it has a row for each protocol and method.
_PAGE_WIDTH = 160


def _compare(words: list[str], console: Any) -> dict[str, Any]:
    out = _arguments.take(words, "out")
    if wrong := [word for word in words if not os.path.isdir(word)]:
        raise UserError(
            f"{wrong[0]}: there is no such folder; compare takes folders of runs, and out=<folder>"
        )
    if not words:
        raise UserError("compare: takes folders of runs; see metalearn compare --help")
    return compare([Path(word) for word in words], None if out is None else Path(out), console)


main = _arguments.with_json(_compare)


def compare(folders: list[Path], out: Path | None, console: Any) -> dict[str, Any]:
    """Print the table of the runs in and below folders; write comparison.md, .csv and .png.

    `out` is None for the default of HELP. Return the content of --json. Raise UserError if there is
    no finished run.
    """
    from metalearn.report.console import print_lines
    from metalearn.report.folder import RunFolder
    from metalearn.report.measurements import measurements_of, runs_in

    runs, others = runs_in(folders)
    if not runs:
        name = RunFolder(Path()).result.name
        raise UserError(f"{folders[0]}: no finished run ({name}) there or below")
    measurements: list[Any] = []
    left_out: list[str] = []
    for run in runs:
        try:
            measurements += measurements_of(run)
        except UserError as error:
            left_out.append(str(error))
    if not measurements:
        raise UserError(left_out[0])
    if out is None:
        out = folders[0] if len(folders) == 1 else _arguments.output_folder(None, "compare")
    with writing(out, "; name another with out="):
        out.mkdir(parents=True, exist_ok=True)
        content = _write(measurements, out, console)
    if untested := [folder for folder in others if RunFolder(folder).is_trained]:
        more = f" and {len(untested) - 1} more" if len(untested) > 1 else ""
        left_out.append(f"{untested[0]}{more}, not tested; to test it: metalearn resume <folder>")
    left_out += [f"{one} {reason}" for one, reason in others.items() if one not in untested]
    shown = [f"left out: {line}" for line in left_out]
    print_lines(console, [*shown, *content["files"]], "  ")
    return {**content, "left_out": left_out}


def _write(measurements: list[Any], out: Path, console: Any) -> dict[str, Any]:
    """Print and write the comparison. Return measurements, methods, notes and files."""
    from metalearn.report.comparison import Comparison
    from metalearn.report.console import print_line, print_lines
    from metalearn.report.plots import draw_comparison
    from metalearn.report.scores import write_csv
    from metalearn.report.tables import markdown_table, result_table
    from metalearn.system.atomic import write_text

    table_file = out / "comparison.csv"
    lines = [_row(one) for one in measurements]
    cells = [{**line, "minutes": f"{line['minutes']:.2f}"}.values() for line in lines]
    write_csv(table_file, lines[0], ([visible(str(cell)) for cell in row] for row in cells))
    methods: list[dict[str, Any]] = []
    all_notes: list[str] = []
    text: list[str] = []
    plots: list[Path] = []
    for metric in dict.fromkeys(one.result.metric for one in measurements):
        comparison = Comparison([one for one in measurements if one.result.metric == metric])
        rows = comparison.rows(console.width, "\n")
        previous = None
        for row in rows if "test" in rows[0] else []:  # name each protocol once
            row["test"], previous = "" if row["test"] == previous else row["test"], row["test"]
        console.print(result_table(rows, list(rows[0]).index("method") + 1))
        notes = comparison.notes()
        all_notes += notes
        methods += comparison.summary()
        print_lines(console, notes, "  ")
        text += [*markdown_table(comparison.rows(_PAGE_WIDTH, ", ")), ""]
        text += [*(f"- {line}" for line in notes), ""]
        plots.append(out / (f"comparison_{metric}.png" if plots else "comparison.png"))
        draw_comparison(comparison.panels(), metric, plots[-1])
    if line := _sampler_note(measurements):
        all_notes.append(line)
        print_line(console, f"  {line}")
        text += [f"- {line}", ""]
    page = out / "comparison.md"
    write_text(page, "\n".join(map(visible, text)))
    files = [str(file) for file in (page, table_file, *plots)]
    return {"measurements": lines, "methods": methods, "notes": all_notes, "files": files}


def _sampler_note(measurements: list[Any]) -> str:
    """Return a line if runs were tested on episodes of different sampler versions, or ""."""
    runs: dict[int, set[str]] = defaultdict(set)
    for one in measurements:
        runs[int(one.result.protocol.get("sampler", 1))].add(str(one.folder))
    if len(runs) < 2:
        return ""
    parts = [
        f"version {version}: {', '.join(sorted(folders)[:3])}"
        for version, folders in sorted(runs.items())
    ]
    return (
        "tested on episodes of different versions of the sampler, which are different measurements "
        f"({'; '.join(parts)}); metalearn evaluate tests an old run on the episodes of this version"
    )


def _row(one: Any) -> dict[str, Any]:
    result, protocol = one.result, one.result.protocol
    return {
        "run": str(one.folder), "algorithm": one.name, "variant": one.variant, "seed": result.seed,
        "dataset": one.data, "split": result.split, "protocol_id": result.protocol_id,
        **{name: protocol[name] for name in ("way", "shot", "query", "statistics")},
        "score": result.metric, "mean": result.test.mean, "ci95": result.test.ci95,
        "minutes": one.minutes, "hardware": one.hardware,
    }  # fmt: skip
