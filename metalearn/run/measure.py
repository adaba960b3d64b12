"""One measurement: test a state on the test episodes of a run, and save the scores."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metalearn.data.classes import ClassData
from metalearn.report import stats
from metalearn.report.folder import RunFolder
from metalearn.report.progress import SILENT, Listener
from metalearn.report.result import Result, hash_of
from metalearn.report.scores import write_csv, write_scores
from metalearn.run import checkpoint, scoring
from metalearn.run.build import Run
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.store import MixedClasses
from metalearn.tasks.types import Estimate, State

#: Half-widths of the interval for which the required number of episodes is reported.
_HALF_WIDTHS = (0.005, 0.001)
#: A class is among the worst only if it had this many queries.
_MIN_QUERIES_OF_CLASS = 30


def measure(
    run: Run,
    state: State,
    name: str,
    environment: dict[str, Any],
    prefix: Path | None = None,
    steps: int | None = None,
    listener: Listener = SILENT,
    others: Sequence[tuple[Run, State]] = (),
) -> tuple[Result, Tensor]:
    """Test a state as `scoring.test` does; return the result, and the score of each episode, [E].

    With `prefix`, write `<prefix>scores.csv` and, for classes, `<prefix>classes.csv`.
    """
    start = time.perf_counter()
    tested = scoring.test(run, state, steps, listener, others)
    scores = tested.scores
    if prefix:
        write_scores(prefix.with_name(f"{prefix.name}scores.csv"), run.metric.name, scores)
    mean, episodes = stats.worst_decile(scores, run.metric.higher_is_better)
    details: dict[str, Any] = {"worst_decile": {"mean": mean, "episodes": episodes}}
    if tested.classes is not None and tested.correct is not None and tested.confidence is not None:
        is_query = tested.classes >= 0
        correct, confidence = tested.correct[is_query], tested.confidence[is_query]
        details["expected_calibration_error"] = stats.expected_calibration_error(
            confidence, correct
        )
        details["episodes_needed"] = {
            str(width): stats.episodes_needed(scores, width) for width in _HALF_WIDTHS
        }
        names = run.class_names[run.test_split]
        accuracy, queries = stats.per_class_accuracy(correct, tested.classes[is_query], len(names))
        rows = sorted(
            zip(names, accuracy.tolist(), queries.tolist(), strict=True),
            key=lambda row: (row[1], row[0]),
        )
        if prefix:
            write_csv(
                prefix.with_name(f"{prefix.name}classes.csv"),
                ("class", "accuracy", "queries"),
                ((name, f"{share:.6f}", count) for name, share, count in rows if count),
            )
        worst = [(name, share) for name, share, count in rows if count >= _MIN_QUERIES_OF_CLASS]
        details["worst_classes"] = dict(worst[:5])
        details |= _generalised(run, tested.correct, tested.classes)
        if pretraining := run.algorithm.backbone.pretraining(names):
            details["pretraining"] = pretraining | {"classes": len(names)}
    result = result_of(run, stats.estimate(scores), name, environment)
    result.details, result.split = details, run.test_split
    result.protocol, result.protocol_id = run.protocol, run.protocol_id
    result.seconds = time.perf_counter() - start
    return result, scores


def _generalised(run: Run, correct: Tensor, classes: Tensor) -> dict[str, Any]:
    """Return the accuracy on base and on novel classes, if episodes have both; else {}."""
    view = run.data.views[run.test_split] if isinstance(run.data, ClassData) else None
    if not isinstance(view, MixedClasses):
        return {}
    parts = stats.base_and_novel(correct, classes, view.num_base)
    scores = [dataclasses.asdict(stats.estimate(part)) for part in parts]
    own: dict[str, Any] = dict(zip(("base", "novel", "harmonic_mean"), scores, strict=True))
    return {"generalised": {**own, "base_images_were_trained_on": run.config.train.steps > 0}}


def result_of(run: Run, score: Estimate, name: str, environment: dict[str, Any]) -> Result:
    """Return a validation score as a result, without details."""
    protocol = {**run.protocol, "split": "val", "episodes": score.episodes}
    return Result(
        metric=run.metric.name, higher_is_better=run.metric.higher_is_better, test=score,
        details={}, protocol=protocol, protocol_id=hash_of(protocol), name=name,
        seed=run.config.seed, environment=environment, seconds=0.0, split="val",
    )  # fmt: skip


def trained_state(run: Run, folder: Path, file: Path | None = None) -> State:
    """Load the best state of the run in a folder, or that of a file; UserError if it is another."""
    content = checkpoint.load(file or RunFolder(folder).best, run.device)
    spec = {**dataclasses.asdict(run.spec), **content.get("spec", {})}
    known = dataclasses.replace(run.spec, train_classes=spec["train_classes"])
    expected = run.state if known == run.spec else run.algorithm.init(known, prng.key_of(0))
    try:
        return checkpoint.state(content, expected, folder)
    except UserError:
        here, trained = run.spec.input_shape, tuple(spec["input_shape"])
        if here == trained or len(here) != 3:
            raise
        raise UserError(
            f"dataset: its images are {_by(here)}, but the run was trained on {_by(trained)}; "
            f"use dataset.image_size={trained[-1]}"
        ) from None


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
