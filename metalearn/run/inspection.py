"""What test episodes show: confused classes, features in two dimensions, predicted examples.

Legend: E episodes, Q queries, C classes of the split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.report.loggers import Example
from metalearn.run.build import Run
from metalearn.run.describe import Described
from metalearn.run.scoring import Tested
from metalearn.tasks.types import State, Task


def confusion(tested: Tested, num_classes: int) -> tuple[Tensor, Tensor]:
    """Count confusions over episodes.

    Return queries of class i that class j was predicted for, float64 [C, C]; and queries of class i
    in episodes that have class j.
    """
    assert tested.classes is not None and tested.predicted is not None
    is_query = tested.classes >= 0
    pairs = tested.classes[is_query] * num_classes + tested.predicted[is_query]
    counts = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    queries_EC = torch.zeros(len(tested.classes), num_classes + 1, dtype=torch.float64)
    queries_EC.scatter_add_(
        1, tested.classes % (num_classes + 1), torch.ones_like(tested.classes, dtype=torch.float64)
    )
    queries_EC = queries_EC[:, :num_classes]  # the last column has the padding
    return counts.double(), queries_EC.T @ (queries_EC > 0).double()


def most_confused(counts: Tensor, number: int) -> list[int]:
    """Return up to `number` classes of the most frequent confusions (counts [C, C]), in order."""
    errors = counts.clone().fill_diagonal_(0)
    both = (errors + errors.T).triu()
    classes: dict[int, None] = {}
    for place in both.flatten().argsort(descending=True, stable=True).tolist():
        pair = divmod(place, len(counts))
        if both[pair] == 0 or len(classes.keys() | set(pair)) > number:
            break
        classes |= dict.fromkeys(pair)
    return list(classes)


def principal_components(x: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Project points [M, D] on their first two principal components; also their variance shares."""
    centred = (x - x.mean(0)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    shares = [*(s**2 / (s**2).sum().clamp_min(1e-30)).tolist(), 0.0]
    points = u[:, :2] * s[:2]
    return F.pad(points, (0, 2 - points.shape[1])), (shares[0], shares[1])


def predicted_episode(run: Run, state: State, number: int) -> tuple[Task, list[str], Tensor]:
    """Return a test episode, the names of its labels, and the predicted labels [Q]."""
    at = torch.tensor([number])
    task, classes = run.test.draw(at, 1), run.test.classes(at, 1)
    names = run.class_names[run.test_split]
    assert classes is not None
    chosen = run.test_engine.predictions(state, task).argmax(-1)[0].cpu()
    return task, [names[one] for one in classes[0].tolist()], chosen


def examples(run: Run, state: State) -> list[Example]:
    """Return the examples of the first test episode and their predictions; [] without classes."""
    if run.test.classes(torch.tensor([0]), 1) is None:
        return []
    described = Described(run.config, run.test_split)
    task, names, chosen = predicted_episode(run, state, 0)
    result = []
    for label, row in enumerate(described.episode()):
        predicted = chosen[task.query.y[0].cpu() == label].tolist()
        for part, own in row["examples"].items():
            shown = [names[one] for one in predicted] if part == "query" else [""] * len(own)
            for content, name in zip(own, shown, strict=True):
                content = 1 - content if described.is_ink else content
                result.append(Example(part, row["class"], name, content))
    return result
