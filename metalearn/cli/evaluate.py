"""Test a trained run again, under the same or a different protocol."""

import os
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError

HELP = """metalearn evaluate <folder> [<folder> …] [key=value …] [dataset=a,b] [test.overlap=allow]
                    [split=train|val|test|all|train+test] [curve=shot|way|steps] [at=1,5]
                    [corrupt=noise|occlusion] [ensemble=true] [--json]

Tests the best checkpoint of a finished run, with transductive and with inductive statistics and
their paired difference. Writes evaluations/<protocol_id>.json into the run folder.

  metalearn evaluate outputs/maml-omniglot/<time>
  metalearn evaluate … episode.shot=5 episode.query=1 test.episodes=600
  metalearn evaluate … statistics=support_plus_one       one query at a time
  metalearn evaluate … algo.test_inner_steps=10          more adaptation
  metalearn evaluate … dataset=glyphs                    a different dataset: its test classes
  metalearn evaluate … dataset=glyphs split=all          a different dataset: all its classes
  metalearn evaluate run0 run1 dataset=glyphs,birds.zip:all      several runs and datasets: a table
  metalearn evaluate … split=train                       accuracy on the training classes
  metalearn evaluate … split=train+test                  trained and new classes in each episode
  metalearn evaluate … curve=shot                        accuracy over shots: table, CSV, PNG
  metalearn evaluate outputs/protonet-omniglot/<time> curve=way at=5,10,20    over ways
  metalearn evaluate … curve=steps                       accuracy over inner steps 0 to 10
  metalearn evaluate … corrupt=noise at=0,10,30          accuracy on noisy queries, in percent
  metalearn evaluate run0 run1 ensemble=true             the mean of the runs' predictions
  metalearn evaluate run0 ensemble=true                  of the checkpoints of checkpoint.keep=5

corrupt= changes the queries (and unlabelled images), not the support set: normal noise on the
pixels, or a grey box that covers a share of the image. ensemble=true averages probabilities of runs
that are tested by the same protocol, and writes into the first folder; of one run, it averages
those of the checkpoints that training with checkpoint.keep=… kept.

Images of a different dataset get the size, the channels and the normalisation of the run's own, and
if they have fewer classes than an episode, the episode has all of them. In dataset=a,b each is a
name, or a folder or zip of images, perhaps with its split: a:val. Each run is then tested with its
own statistics. If the run was trained or validated on some of the tested images (found by a hash of
their pixels before any resizing), the test is refused; with test.overlap=allow, the result lists
them. A run without training steps has no training images.

With split=train+test, half of the classes of each episode (rounded down) are base classes, which
the run was trained on, with the same images; the others are novel. The accuracy is also given for
each kind of query, with the harmonic mean of both (the mean over episodes).

Folders can also be given as run=<folder>,<folder>. --json prints one JSON document with the results
or the points of the curve, the files, and failed tests; everything else goes to standard error.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}",
    "run={folder}",
    "split=train|val|test|all|train+test",
    "curve=shot|way|steps",
    "at=",
    "corrupt=noise|occlusion",
    "ensemble=true",
    "{settings}",
    "--json",
)


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    with _arguments.json_document(words) as document:
        document |= _evaluate(words)
    return 1 if document.get("failures") else 0


def _evaluate(args: list[str]) -> dict[str, Any]:
    words = [
        f"run={word}" if word[:1] != "-" and ("=" not in word or os.path.isdir(word)) else word
        for word in args
    ]
    overrides = _arguments.parse_settings("evaluate", words)
    folders = [
        folder
        for word in overrides
        if word.startswith("run=")
        for folder in _listed(word.removeprefix("run="))
    ]
    overrides = [word for word in overrides if not word.startswith("run=")]
    given = _arguments.take(overrides, "dataset")
    datasets = _listed(given or "")
    if given is not None and not datasets:
        raise UserError(
            "dataset=: should be one or several names or folders of images, with commas"
        )
    split = _arguments.take(overrides, "split", "test")
    curve = _arguments.take(overrides, "curve")
    points = _arguments.take(overrides, "at")
    corrupt = _arguments.take(overrides, "corrupt")
    ensemble = _arguments.take(overrides, "ensemble", "false")
    if ensemble not in ("true", "false"):
        raise UserError(f"ensemble={ensemble}: should be true or false")
    if not folders or split is None:
        raise UserError(
            "evaluate: takes a folder, or run=<folder>, and key=value settings; see metalearn "
            "evaluate --help"
        )
    from metalearn.report.console import open_console
    from metalearn.run.ensemble import evaluate_ensemble
    from metalearn.run.evaluate import evaluate, evaluate_several
    from metalearn.run.other_data import Target

    is_ensemble = ensemble == "true"
    if is_ensemble and len(datasets) > 1:
        raise UserError("ensemble=true: takes at most one dataset")
    has_curve = any(word is not None for word in (curve, points, corrupt))
    if has_curve and (is_ensemble or len(folders) > 1 or len(datasets) > 1):
        name = "curve" if corrupt is None else "corrupt"
        raise UserError(f"{name}: takes one run and one dataset")
    if is_ensemble or (len(folders) == 1 and len(datasets) < 2):
        targets = [Target.of(word) for word in datasets]
        overrides = [word for target in targets for word in target.overrides] + overrides
        split = next((target.split for target in targets if target.split), split)
        if is_ensemble:
            paths = [Path(folder) for folder in folders]
            return evaluate_ensemble(paths, overrides, split, open_console())
        return evaluate(Path(folders[0]), overrides, split, curve, open_console(), points, corrupt)
    return evaluate_several(
        [Path(folder) for folder in folders], datasets, overrides, split, open_console()
    )


def _listed(text: str) -> list[str]:
    """Return the items of a list with commas; a path that exists, perhaps with `:…`, is one."""
    name, _, split = text.rpartition(":")
    if os.path.exists(text) or (os.path.exists(name) and "," not in split):
        return [text]
    return [word.strip(" '\"") for word in text.strip("[]").split(",") if word]
