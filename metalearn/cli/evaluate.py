"""Test a trained run again, under the same or a different protocol."""

from pathlib import Path

from metalearn.cli import _arguments
from metalearn.system.errors import UserError

HELP = """metalearn evaluate run=<folder> [key=value …] [split=train|val|test] [curve=shot|steps]

Tests the best checkpoint of a finished run, with transductive and with inductive statistics and
their paired difference. Writes evaluations/<protocol_id>.json into the run folder.

  metalearn evaluate run=outputs/maml-omniglot/<time>
  metalearn evaluate run=… episode.shot=5 episode.query=1 test.episodes=600
  metalearn evaluate run=… statistics=support_plus_one       one query at a time
  metalearn evaluate run=… algo.test_inner_steps=10          more adaptation
  metalearn evaluate run=… dataset=glyphs                    a different dataset
  metalearn evaluate run=… split=train                       accuracy on the training classes
  metalearn evaluate run=… curve=shot                        accuracy over shots: table, CSV, PNG
  metalearn evaluate run=… curve=steps                       accuracy over inner steps 0 to 10
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}",
    "run={folder}",
    "split=train|val|test|all",
    "curve=shot|way|steps",
    "{settings}",
)


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    overrides = _arguments.parse_settings("evaluate", args)
    run = _arguments.take(overrides, "run")
    split = _arguments.take(overrides, "split", "test")
    curve = _arguments.take(overrides, "curve")
    if run is None or split is None:
        raise UserError(
            "evaluate: takes run=<folder> and key=value settings; see metalearn evaluate --help"
        )
    from metalearn.report.console import open_console
    from metalearn.run.evaluate import evaluate

    evaluate(Path(run), overrides, split, curve, open_console())
    return 0
