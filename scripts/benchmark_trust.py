"""Simulate users of `metalearn predict`: is what it says about their labels true?

python scripts/benchmark_trust.py [images=<folder or zip> … | features=<file.npy>] [users=1000]
                                  [shots=5] [heads=prototype,…] [backbone=efficientnet_lite0]

A user has 5 to 10 classes with `shots` examples each, and 100 other images of these classes. 100
images of two classes that are not among theirs measure `unknown`. The classes are those of `images`
(60 images of each are embedded), those of `features` (float [C, 60, D]) or, by default, Gaussian
ones that differ in how well they are separated. Adds the rows to benchmarks/trust.json, and writes
benchmarks/trust.md from them.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from metalearn.predict import inputs
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.networks import open_network
from metalearn.report.environment import describe_environment
from metalearn.report.stats import expected_calibration_error

_OUT = Path(__file__).parent.parent / "benchmarks"
_EACH, _QUERIES, _RATE = 60, 100, 0.1
_COLUMNS = {
    "accuracy": "accuracy", "stated": "stated", "covered": "covered", "width": "median width",
    "calibration": "ECE", "plausible": "in the set", "size": "size of the set",
    "unknown": "called unknown", "auroc": "AUROC of unknown", "found": "wrong label found",
    "alarms": "right labels doubted",
}  # fmt: skip


def embedded(sources: list[str], backbone: str) -> np.ndarray:
    """Embed images of all classes of some folders or zips, float32 [C, 60, D]."""
    network = open_network(backbone, None, False)
    assert network is not None
    with tempfile.TemporaryDirectory() as folder:
        items = [item for source in sources for item in inputs.examples(source, Path(folder))]
        names = sorted({item.label for item in items})
        rng = np.random.default_rng(0)
        features = []
        for name in names:
            own = [item.value for item in items if item.label == name]
            chosen = rng.permutation(len(own))[:_EACH]
            features.append(network.represent([own[index] for index in chosen]))
            print(f"{name}: {len(features)} of {len(names)} classes embedded", flush=True)
    return np.stack(features)


def gaussians(rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """Return 12 Gaussian classes, float [12, 60, D], whose separation differs from user to user."""
    separation = rng.uniform(0.4, 1.2)
    means = separation * rng.uniform(0.7, 1.3, (12, 1, 1)) * rng.normal(size=(12, 1, size))
    spread = rng.uniform(0.7, 1.3, (12, 1, 1))
    origin: np.ndarray = 2 * rng.normal(size=size)
    return origin + means + spread * rng.normal(size=(12, _EACH, size))


def simulate(
    features: np.ndarray, rng: np.random.Generator, head: str, shots: int
) -> dict[str, Any]:
    """Return what one user would find.

    Args:
        features: Images of all classes [C, 60, D].
        rng: Draws the user.
        head: Name of the head.
        shots: Number of examples of each class.
    """
    way = int(rng.integers(5, 11))
    classes = rng.permutation(len(features))[: way + 2]
    mine = np.stack([features[one][rng.permutation(_EACH)] for one in classes])
    x, y = mine[:way, :shots].reshape(way * shots, -1), np.repeat(np.arange(way), shots)
    others, truth = mine[:way, shots:], np.repeat(np.arange(way), _EACH - shots)
    chosen = rng.permutation(len(truth))[:_QUERIES]
    queries, truth = others.reshape(len(truth), -1)[chosen], truth[chosen]
    strangers = mine[way:, : _QUERIES // 2].reshape(_QUERIES, -1)

    classifier = FewShotClassifier(lambda x: x, head, error_rate=_RATE).fit(x, y)
    labels, trust = classifier.label(queries), classifier.confidence_
    right = np.array([label.label for label in labels]) == truth
    accuracy = float(right.mean())
    interval = trust.interval(_QUERIES)
    assert interval is not None
    pairs = [(one, label.plausible) for one, label in zip(truth, labels, strict=True)]
    novelty = np.concatenate([classifier._evaluate(z).novelty for z in (queries, strangers)])
    ranks = rankdata(novelty)[_QUERIES:]
    wrong = y.copy()
    row = int(rng.integers(len(y)))
    wrong[row] = (y[row] + rng.integers(1, way)) % way
    doubts = FewShotClassifier(lambda x: x, head).fit(x, wrong).confidence_.doubtful
    confidence = torch.tensor([label.probability for label in labels])
    return {
        "accuracy": accuracy,
        "stated": trust.accuracy,
        "covered": interval[0] - 1e-9 <= accuracy <= interval[1] + 1e-9,
        "width": interval[1] - interval[0],
        "confidence": float(confidence.mean()),
        "calibration": expected_calibration_error(confidence, torch.from_numpy(right)),
        "plausible": mean([one in some for one, some in pairs if some is not None]),
        "size": mean([len(some) for _, some in pairs if some is not None]),
        "unknown": mean([label.unknown for label in labels if label.unknown is not None]),
        "auroc": (ranks.mean() - (_QUERIES + 1) / 2) / _QUERIES,
        "found": row in [doubt[0] for doubt in doubts],
        "alarms": len(trust.doubtful) / len(y),
    }  # fmt: skip


def mean(values: list[Any]) -> float | None:
    """Return the mean; None if there are no values."""
    return float(np.mean(values)) if values else None


def row_of(users: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each number over users; the median of the widths."""
    row: dict[str, float | None] = {}
    for name in users[0]:
        values = [float(user[name]) for user in users if user[name] is not None]
        function = np.median if name == "width" else np.mean
        row[name] = round(float(function(values)), 4) if values else None
    return row


def main() -> None:
    """Simulate, and write both files."""
    words = [word.partition("=") for word in sys.argv[1:]]
    sources = [value for key, _, value in words if key == "images"]
    given = {key: value for key, _, value in words}
    users, shots = int(given.get("users", 1000)), int(given.get("shots", 5))
    backbone = given.get("backbone", "efficientnet_lite0")
    torch.set_num_threads(1)
    data = f"{', '.join(Path(one).name for one in sources)}, {backbone}" if sources else "gaussians"
    features = embedded(sources, backbone) if sources else None
    if "features" in given:
        features, data = np.load(given["features"]), Path(given["features"]).stem
    path = _OUT / "trust.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    for head in given.get("heads", "prototype").split(","):
        results = []
        for seed in range(users):
            rng = np.random.default_rng(seed)
            own = gaussians(rng) if features is None else features
            results.append(simulate(own, rng, head, shots))
        environment = describe_environment("cpu")
        key = {"data": data, "shots": shots, "head": head}
        row = {**key, "users": users, **row_of(results), "commit": environment["commit"]}
        rows = [one for one in rows if not key.items() <= one.items()] + [row]
        rows.sort(key=lambda one: (one["data"], one["shots"], one["head"]))
        path.write_text(json.dumps(rows, indent=1) + "\n")
        (_OUT / "trust.md").write_text(_page(rows))
        print(json.dumps(row), flush=True)


def _page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Is what `metalearn predict` says true?",
        "",
        "`python scripts/benchmark_trust.py`: simulated users with 5 to 10 classes, and 100 other",
        "images each. *Stated*: the accuracy in cross-validation on the examples. *Covered*: users",
        "whose accuracy is in the stated 95% interval. *In the set*, *called unknown*: share of",
        f"their images, at an error rate of {_RATE:.0%}. *AUROC of unknown*: their images against",
        "images of two other classes. *Wrong label found*: one of the labels of the examples was",
        "changed; *right labels doubted*: share of the examples, where none was changed.",
        "",
        f"| data | shots | head | users | {' | '.join(_COLUMNS.values())} |",
        f"|{'---|' * (len(_COLUMNS) + 4)}",
    ]
    for row in rows:
        cells = [
            "" if row[name] is None
            else f"{row[name]:.2f}" if name in ("size", "auroc") else f"{row[name]:.1%}"
            for name in _COLUMNS
        ]  # fmt: skip
        first = [row["data"], row["shots"], f"`{row['head']}`", row["users"]]
        lines.append(f"| {' | '.join(map(str, [*first, *cells]))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
