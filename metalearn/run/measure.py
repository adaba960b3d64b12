"""One measurement: the test episodes of a run, what they say, and the protocol they stand for."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalearn.report import stats
from metalearn.report.tables import as_dict
from metalearn.run import checkpoint, loop
from metalearn.run.build import Run
from metalearn.system.errors import UserError
from metalearn.tasks.types import State

#: Half-widths of the interval for which the number of episodes is told: half a point, a tenth of a point.
_HALF_WIDTHS = (0.005, 0.001)
#: A class is called bad only when it was asked this often.
_QUERIES_OF_A_CLASS = 30


def measure(
    run: Run, state: State, files: Path | None = None, steps: int | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Tests once: the score of each episode and, for classes, the accuracy of each class.

    Args: files: `<files>scores.csv` and `<files>classes.csv` are written; steps: of adaptation, None for the settings'.
    Returns: what `result.json` says of it, and the scores [E].
    Raises: RunFailed when a prediction is not finite.
    """
    tested = loop.test(run, state, steps)
    scores = tested.scores
    if files:
        write_scores(files.with_name(f"{files.name}scores.csv"), run.metric.name, scores)
    worst, which = stats.worst_decile(scores, run.metric.higher_is_better)
    details: dict[str, Any] = {"worst_decile": {"mean": worst, "episodes": which}}
    if tested.classes is not None and tested.correct is not None and tested.confidence is not None:
        correct = tested.correct.flatten()
        details["expected_calibration_error"] = stats.expected_calibration_error(
            tested.confidence.flatten(), correct
        )
        details["episodes_needed"] = {
            str(width): stats.episodes_needed(scores, width) for width in _HALF_WIDTHS
        }
        names = run.class_names[run.test_split]
        accuracy, asked = stats.per_class_accuracy(correct, tested.classes.flatten(), len(names))
        rows = sorted(
            zip(names, accuracy.tolist(), asked.tolist(), strict=True),
            key=lambda row: (row[1], row[0]),
        )
        if files:
            lines = [
                "class,accuracy,queries",
                *(f"{name},{share:.6f},{count}" for name, share, count in rows if count),
            ]
            files.with_name(f"{files.name}classes.csv").write_text("\n".join(lines) + "\n")
        judged = [(name, share) for name, share, count in rows if count >= _QUERIES_OF_A_CLASS]
        details["worst_classes"] = dict(judged[:5])
    result = {
        "test": {run.metric.name: as_dict(stats.estimate(scores))},
        "details": details,
        "protocol": run.protocol,
        "protocol_id": run.protocol_id,
    }
    return result, scores


def write_scores(path: Path, score: str, scores: Tensor) -> None:
    """One line a test episode."""
    lines = [
        f"episode,{score}",
        *(f"{index},{value:.6f}" for index, value in enumerate(scores.tolist())),
    ]
    path.write_text("\n".join(lines) + "\n")


def read_scores(path: Path) -> Tensor:
    """Scores [E] as `write_scores` wrote them. Raises: UserError for a missing or foreign file."""
    try:
        lines = path.read_text().splitlines()[1:]
        return torch.tensor([float(line.split(",")[1]) for line in lines], dtype=torch.float64)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is not a list of scores ({error})") from None


def trained_state(run: Run, folder: Path) -> State:
    """The best state of the run in `folder`. Raises: UserError when its weights do not fit the run."""
    return checkpoint.state(
        checkpoint.load(folder / "checkpoints" / "best.pt", run.device), run.state, folder
    )
