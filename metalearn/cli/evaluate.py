"""Test a trained run again, under the same or a different protocol."""

import os
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError

HELP = """metalearn evaluate <folder> [key=value …] [split=train|val|test|all]
                    [curve=shot|way|steps] [at=1,5,10] [--json]

Tests the best checkpoint of a finished run, with transductive and with inductive statistics and
their paired difference. Writes evaluations/<protocol_id>.json into the run folder.

  metalearn evaluate outputs/maml-omniglot/<time>
  metalearn evaluate … episode.shot=5 episode.query=1 test.episodes=600
  metalearn evaluate … statistics=support_plus_one       one query at a time
  metalearn evaluate … algo.test_inner_steps=10          more adaptation
  metalearn evaluate … dataset=glyphs                    a different dataset: its test classes
  metalearn evaluate … dataset=glyphs split=all          a different dataset: all its classes
  metalearn evaluate … split=train                       accuracy on the training classes
  metalearn evaluate … curve=shot                        accuracy over shots: table, CSV, PNG
  metalearn evaluate … curve=way at=5,10,20              accuracy over numbers of classes
  metalearn evaluate … curve=steps                       accuracy over inner steps 0 to 10

The folder can also be given as run=<folder>. --json prints one JSON document with the results, or
the points of the curve, and the files; everything else goes to standard error.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}",
    "run={folder}",
    "split=train|val|test|all",
    "curve=shot|way|steps",
    "{settings}",
    "--json",
)


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    with _arguments.json_document(words) as document:
        document |= _evaluate(words)
    return 0


def _evaluate(args: list[str]) -> dict[str, Any]:
    words = [
        f"run={word}" if word[:1] != "-" and ("=" not in word or os.path.isdir(word)) else word
        for word in args
    ]
    overrides = _arguments.parse_settings("evaluate", words)
    run = _arguments.take(overrides, "run")
    split = _arguments.take(overrides, "split", "test")
    curve = _arguments.take(overrides, "curve")
    points = _arguments.take(overrides, "at")
    if run is None or split is None:
        raise UserError(
            "evaluate: takes a folder, or run=<folder>, and key=value settings; see metalearn "
            "evaluate --help"
        )
    from metalearn.report.console import open_console
    from metalearn.run.evaluate import evaluate

    return evaluate(Path(run), overrides, split, curve, open_console(), points)
