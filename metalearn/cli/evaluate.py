"""Test a trained run again, under the same or a different protocol."""

from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError

HELP = """metalearn evaluate <folder> [<folder> …] [key=value …] [dataset=a,b] [test.overlap=allow]
                    [split=train|val|test|all|train+test] [curve=shot|way|steps] [at=1,5]
                    [corrupt=noise|occlusion] [ensemble=true] [--json]

Tests the best checkpoint of a trained run, with transductive and with inductive statistics and
their paired difference, unless the method is transductive itself. Writes
evaluations/<protocol_id>.json into the run folder.

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
    "{folder}", "run={folder}", "split=train|val|test|all|train+test", "curve=shot|way|steps",
    "at=", "corrupt=noise|occlusion", "ensemble=true", "{settings}", "--json",
)  # fmt: skip


def _evaluate(words: list[str], console: Any) -> dict[str, Any]:
    paths = [Path(folder) for folder in _arguments.take_folders(words)]
    overrides = _arguments.parse_settings("evaluate", words)
    given = _arguments.take(overrides, "dataset")
    datasets = _arguments.listed(given or "")
    if given is not None and not datasets:
        raise UserError(
            "dataset=: should be one or several names or folders of images, with commas"
        )
    split = str(_arguments.take(overrides, "split", "test"))
    curve, points, corrupt = (_arguments.take(overrides, key) for key in ("curve", "at", "corrupt"))
    ensemble = _arguments.take(overrides, "ensemble", "false")
    if ensemble not in ("true", "false"):
        raise UserError(f"ensemble={ensemble}: should be true or false")
    if not paths:
        raise UserError(
            "evaluate: takes a folder, or run=<folder>, and key=value settings; see metalearn "
            "evaluate --help"
        )
    from metalearn.run.ensemble import evaluate_ensemble
    from metalearn.run.evaluate import evaluate, evaluate_several
    from metalearn.run.other_data import Target

    is_ensemble = ensemble == "true"
    if is_ensemble and len(datasets) > 1:
        raise UserError("ensemble=true: takes at most one dataset")
    is_single = len(paths) == 1 and len(datasets) < 2
    has_curve = any(word is not None for word in (curve, points, corrupt))
    if has_curve and (is_ensemble or not is_single):
        name = "curve" if corrupt is None else "corrupt"
        raise UserError(f"{name}: takes one run and one dataset")
    if not is_ensemble and not is_single:
        return evaluate_several(paths, datasets, overrides, split, console)
    for target in map(Target.of, datasets):
        overrides, split = [*target.overrides, *overrides], target.split or split
    if is_ensemble:
        return evaluate_ensemble(paths, overrides, split, console)
    return evaluate(paths[0], overrides, split, curve, console, points, corrupt)


main = _arguments.with_json(_evaluate)
