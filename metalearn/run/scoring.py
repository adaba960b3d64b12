"""Score a state on the episodes of validation and test."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.engine import Engine
from metalearn.engine.replay import Replays
from metalearn.report.progress import SILENT, Listener
from metalearn.run import features
from metalearn.run.build import Run
from metalearn.system.errors import RunFailed
from metalearn.tasks.ranges import Part, numbers_of, parts_of
from metalearn.tasks.sampling import TaskSource
from metalearn.tasks.types import State, Task


def evaluate(
    run: Run,
    state: State,
    source: TaskSource,
    episodes: int,
    listener: Listener = SILENT,
    replays: Replays | None = None,
) -> Tensor:
    """Return the score of each episode, float32 [E] on the host."""
    scores, numbers = [], []
    for part, engine, tasks in _drawn(
        run, state, source, episodes, run.test_batch, "val", listener
    ):
        scores.append(engine.scores(state, tasks, replays=replays))
        numbers.append(numbers_of(part))
    return _gathered(run, scores, numbers, episodes)


def _drawn(
    run: Run,
    state: State,
    source: TaskSource,
    episodes: int,
    size: int,
    phase: str,
    listener: Listener,
) -> Iterator[tuple[Part, Engine, Task]]:
    """Yield this process's share of the episodes in parts of `size`, each counted when done."""
    first, total = run.processes.share(episodes)
    parts = parts_of(source, first, total, size)
    engine, source = features.with_features(
        run, run.test_engine, source, state, parts, listener, size
    )
    listener.episodes(phase, 0, total)
    if phase == "test" and engine.algorithm is not run.test_engine.algorithm:
        listener.note("the test embeds each input once, as embeddings depend on nothing else")
    done = 0
    for part in parts:
        yield part, engine, source.draw(*part)
        done += part[1]
        listener.episodes(phase, done, total)


@dataclasses.dataclass(frozen=True)
class Tested:
    """Outcome of the test episodes, on the host; of regression, only the scores."""

    scores: Tensor  # of each episode, float32 [E]
    #: Index within the split of each query's class, int64 [E, Q]. An episode with fewer queries
    #: than others has -1 after its own.
    classes: Tensor | None = None
    predicted: Tensor | None = None  # the same of the class that was predicted
    correct: Tensor | None = None  # whether each query was classified correctly, bool [E, Q]
    confidence: Tensor | None = None  # probability of the predicted class, float32 [E, Q]


def test(
    run: Run,
    state: State,
    steps: int | None,
    listener: Listener = SILENT,  # noqa: PT028 (not a test of ours)
    others: Sequence[tuple[Run, State]] = (),  # noqa: PT028
) -> Tested:
    """Test on the fixed test episodes; raise RunFailed if predictions are not finite.

    `steps` is the number of adaptation steps; None for the method's own. With `others`, runs with
    the same test episodes, the predictions of all are averaged, of classes their probabilities.
    """
    episodes, shape = run.config.test.episodes, run.config.episode
    columns: dict[str, list[Tensor]] = {}
    numbers: list[Tensor] = []
    diverged: list[int] = []  # numbers of episodes
    most = shape.query * (shape.way[-1] if isinstance(shape.way, list) else shape.way)
    members = [(run, state), *others]
    drawn = [
        _drawn(
            *(one, own_state, one.test, episodes, run.test_batch, "test"),
            listener if one is run else SILENT,
        )
        for one, own_state in members
    ]
    replays = [Replays(listener.note) for _ in members]
    for parts in zip(*drawn, strict=True):
        each = []
        for (_, engine, tasks), (_, own_state), own in zip(parts, members, replays, strict=True):
            outputs = engine.predictions if run.family.predicts else engine.scores
            each.append(outputs(own_state, tasks, steps, own))
        part, _, tasks = parts[0]
        classes = run.test.classes(*part)
        answers = each[0] if len(each) == 1 else _averaged(each, classes is not None)
        numbers.append(numbers_of(part))
        is_finite = answers.isfinite().reshape(len(answers), -1).all(1).cpu()
        diverged += numbers[-1][~is_finite].tolist()
        y = tasks.query.y
        outcome = {"scores": run.metric.of(answers, y) if run.family.predicts else answers}
        if classes is not None:
            confidence, chosen = answers.softmax(-1).max(-1)
            classes = classes.to(y.device)
            queries = {
                "classes": classes.gather(1, y),
                "predicted": classes.gather(1, chosen),
                "correct": chosen == y,
            }
            missing = (0, max(0, most - y.shape[1]))
            outcome |= {name: F.pad(value, missing, value=-1) for name, value in queries.items()}
            outcome["confidence"] = F.pad(confidence, missing)
        for name, value in outcome.items():
            columns.setdefault(name, []).append(value)
    if diverged:
        raise RunFailed(
            f"outputs for {len(diverged)} of {episodes} test episodes are not finite, the first of "
            f"episode {diverged[0]}; lower train.lr, or algo.inner_lr if the method has one"
        )
    return Tested(**{name: _gathered(run, own, numbers, episodes) for name, own in columns.items()})


def _averaged(outputs: list[Tensor], is_class: bool) -> Tensor:
    """Return the mean of outputs [T, Q, N]; of logits, the logarithm of the mean probability."""
    stacked = torch.stack(outputs)
    if not is_class:
        return stacked.mean(0)
    return stacked.log_softmax(-1).logsumexp(0) - math.log(len(outputs))


def _gathered(run: Run, parts: list[Tensor], numbers: list[Tensor], episodes: int) -> Tensor:
    """Return the values of all processes in the order of the E episodes, [E, …], on the host.

    `parts` and `numbers` are the values and, int64 [T] on the CPU, the numbers of this process's.
    """
    values = torch.cat(parts)[torch.cat(numbers).argsort()]
    if run.processes.size > 1:
        wide = run.processes.scatter(values.double(), episodes)  # exact for every integer here
        values = run.processes.all_reduce_sum(wide).to(values.dtype)
    return values.cpu()
