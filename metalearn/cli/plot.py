"""Draw a trained run, or the sensitivity of a sweep to two settings."""

from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError

HELP = """metalearn plot <folder> [kinds=a,b] [settings=a,b] [split=train|val|test] [key=value …]
               [--json]

Draws a finished run into <folder>/plots, each kind that applies to it:

  learning   training and validation scores over the steps of training
  steps      test score over inner steps, for a method that adapts in steps
  shots      test score over the number of support examples per class
  confusion  the most confused classes, over the test episodes
  embedding  features of the support set and the queries of a test episode, in two dimensions (PCA)
  verification  whether a query and a support example have one class: ROC, equal error rate, and
             the similarity of each pair as CSV
  worst      the episodes with the lowest scores: support, queries, predictions; texts are printed

or, of a multirun folder:

  sensitivity   validation scores over two settings that were swept

  metalearn plot outputs/maml-omniglot/<time>
  metalearn plot … kinds=confusion,worst test.episodes=1000
  metalearn plot … episode.shot=5 split=val
  metalearn plot … kinds=verification test.episodes=1000
  metalearn plot outputs/multirun/<time> settings=algo.inner_lr,train.lr

The tests use the first 200 test episodes, or as many as test.episodes= says; other settings are as
in metalearn evaluate. settings= is needed if more than two settings were swept; scores are then
means over the others. A similarity is the cosine of two embeddings, of a Siamese network its logit;
the intervals of the area under the curve and the equal error rate are by bootstrap over episodes.
Files that exist are replaced. The folder can also be given as run=<folder>.
--json prints one JSON document: files, what was left out and why, confusions, worst episodes.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}", "run={folder}", "kinds=learning|steps|shots|confusion|embedding|verification|worst",
    "settings=", "split=train|val|test", "{settings}", "--json",
)  # fmt: skip


def _plot(words: list[str], console: Any) -> dict[str, Any]:
    folders = _arguments.take_folders(words)
    kinds, settings = (
        _arguments.listed(_arguments.take(words, key) or "") for key in ("kinds", "settings")
    )
    split = _arguments.take(words, "split", "test")
    overrides = _arguments.parse_settings("plot", words)
    if len(folders) != 1:
        raise UserError(
            "plot: takes the folder of a run or of a multirun; see metalearn plot --help"
        )
    if split not in ("train", "val", "test"):
        raise UserError(f"split={split}: should be train, val or test")
    folder = Path(folders[0]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folders[0]}: there is no such folder")
    from metalearn.report.folder import RunFolder
    from metalearn.run.figures import plot_run
    from metalearn.run.sensitivity import plot_sweep

    if RunFolder(folder).is_started:
        if settings:
            raise UserError("settings=: belongs to a multirun folder; this is one run")
        return plot_run(folder, kinds, overrides, split, console)
    if kinds or overrides:
        word = f"kinds={kinds[0]}" if kinds else overrides[0]
        raise UserError(f"{word}: belongs to a run; {folder} is none, only settings= applies to it")
    return plot_sweep(folder, settings, console)


main = _arguments.with_json(_plot)
