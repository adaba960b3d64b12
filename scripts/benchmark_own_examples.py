"""Measure `metalearn predict`: accuracy of each head on four datasets, and seconds.

python scripts/benchmark_own_examples.py data=<folder> [part=accuracy|seconds|features] [draws=200]
                                         [run=<ProtoNet trained on CIFAR-FS>] [out=<file.npy>]

`data` has images/{caltech101,deeppcb,bccd}/images.zip and cifar100/. *Accuracy*: each draw has 5
random classes (BCCD has 3), some examples and 15 other images of each class. *Seconds*: the command
on images of CIFAR-100, from process start to end, with an empty cache and again. *Features*: saves
float32 [100, 60, D] of the classes of CIFAR-100 for scripts/benchmark_trust.py. Writes
benchmarks/own_examples.json and benchmarks/own_examples.md.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from metalearn.algorithms.geometry import class_means, squared_distance
from metalearn.predict import heads, inputs
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.networks import open_network
from metalearn.report.environment import describe_environment
from metalearn.report.stats import estimate
from metalearn.system.atomic import write_json

_OUT = Path(__file__).parent.parent / "benchmarks" / "own_examples.json"
_SHOTS, _QUERIES, _EACH = (1, 5, 10), 15, 60
_DATASETS = {"Caltech-101": 5, "DeepPCB": 5, "BCCD": 3, "CIFAR-FS test classes": 5}
_BACKBONE = "efficientnet_lite0"
Images = dict[str, list[Path]]


def images_of(dataset: str, data: Path, unpacked: Path) -> Images:
    """List the images of each class of a dataset."""
    folder = data / "cifar100"
    if "CIFAR" in dataset:
        sources = sorted(folder.glob("*.zip"))
    else:
        sources = [data / "images" / dataset.lower().replace("-", "") / "images.zip"]
    images = defaultdict(list)
    for item in [item for source in sources for item in inputs.examples(str(source), unpacked)]:
        images[item.label].append(Path(item.value))
    if dataset == "CIFAR-FS test classes":
        names = json.loads((folder / "splits" / "cifar-fs_test.json").read_text())
        return {name: images[name] for _, name in names}
    return dict(sorted(images.items()))


def pixels(paths: list[Path]) -> np.ndarray:
    """Read images as raw pixels, float32 [M, 3 * 32 * 32]."""
    arrays = [np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in paths]
    return np.stack(arrays).reshape(len(paths), -1).astype(np.float32) / 255


def embed(images: Images, network: Any) -> list[np.ndarray]:
    """Embed at most 100 images of each class: arrays [M, D], by class."""
    return [network(paths[:100]) for paths in images.values()]


def accuracies(features: list[np.ndarray], way: int, shots: int, draws: int, how: str) -> Any:
    """Return the accuracy of each draw.

    Args:
        features: Features by class, [M, D] each.
        way: Number of classes of a draw.
        shots: Examples of each.
        draws: Number of draws; the same for all heads.
        how: A head, "auto", or "euclidean": the nearest mean of features as they are.
    """
    y, truth = np.repeat(np.arange(way), shots), np.repeat(np.arange(way), _QUERIES)
    scores = []
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        classes = rng.permutation(len(features))[:way]
        chosen = [features[c][rng.permutation(len(features[c]))] for c in classes]
        x = np.concatenate([one[:shots] for one in chosen])
        queries = np.concatenate([one[shots : shots + _QUERIES] for one in chosen])
        if how == "euclidean":
            means = class_means(torch.from_numpy(x), torch.from_numpy(y), way)
            predicted = squared_distance(torch.from_numpy(queries), means).argmin(1).numpy()
        else:
            classifier = FewShotClassifier(lambda x: x, how, calibrate=False).fit(x, y)
            predicted = classifier.predict(queries)
        scores.append(float((predicted == truth).mean()))
    return estimate(torch.tensor(scores))


def accuracy_rows(data: Path, run: str | None, draws: int) -> list[dict[str, Any]]:
    """Measure all datasets, networks, shots and heads."""
    rows = []
    networks: dict[str, Any] = {_BACKBONE: open_network(_BACKBONE, None, False).represent}  # type: ignore[union-attr]
    if run is not None:
        networks["ProtoNet"] = open_network(None, run, True).represent  # type: ignore[union-attr]
    networks["raw pixels"] = pixels
    for dataset, way in _DATASETS.items():
        with tempfile.TemporaryDirectory() as folder:
            images = images_of(dataset, data, Path(folder))
            embedded = {name: embed(images, network) for name, network in networks.items()}
        for name, features in embedded.items():
            methods = (*heads.HEADS, "auto") if name == _BACKBONE else ("euclidean",)
            for shots in _SHOTS:
                for how in methods:
                    found = accuracies(features, way, shots, draws, how)
                    row = {"dataset": dataset, "network": name, "shots": shots, "head": how}
                    rows.append({**row, "accuracy": found.mean, "ci95": found.ci95})
                    print(json.dumps(rows[-1]), flush=True)
    return rows


def seconds_rows(data: Path, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure the command: 5 classes with 5 examples, 100 with 20; 200 other images."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "all").mkdir()
        images = images_of("CIFAR-100", data, folder / "all")
        for way, shots in ((5, 5), (100, 20)):
            support, query = folder / f"support{way}", folder / f"query{way}"
            query.mkdir()
            for label in list(images)[:way]:
                (support / label).mkdir(parents=True)
                each = 200 // way
                for index, path in enumerate(images[label][: shots + each]):
                    target = support / label if index < shots else query
                    (target / f"{label}{index}.png").symlink_to(path)
            times: dict[str, list[float]] = {"cold": [], "cached": []}
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as cache:
                    for kind, seconds in times.items():
                        start = time.perf_counter()
                        subprocess.run(
                            [sys.executable, "-m", "metalearn", "predict", f"support={support}",
                             f"query={query}", f"out={folder / 'out'}"],
                            check=True, stdout=subprocess.DEVNULL,
                            env=os.environ | {"METALEARN_CACHE": cache},
                        )  # fmt: skip
                        seconds.append(time.perf_counter() - start)
                        print(way, kind, f"{seconds[-1]:.2f} s", flush=True)
            cold, cached = (statistics.median(seconds) for seconds in times.values())
            row = {"classes": way, "shots": shots, "queries": 200, "cold": cold, "cached": cached}
            rows.append({**row, "images_per_s": (way * shots + 200) / (cold - cached)})
    return rows


def _page(content: dict[str, Any]) -> str:
    """Return the Markdown of both tables."""
    lines = ["# Labels for your own examples: accuracy and seconds", ""]
    if "accuracy" in content:
        part = content["accuracy"]
        cells: dict[Any, dict[Any, str]] = defaultdict(dict)
        for row in part["rows"]:
            text = f"{100 * row['accuracy']:.1f} ± {100 * row['ci95']:.1f}"
            cells[row["network"], row["head"]][row["dataset"], row["shots"]] = text
        columns = [(dataset, shots) for dataset in _DATASETS for shots in _SHOTS]
        titles = [f"{dataset}, {shots}" for dataset, shots in columns]
        lines += [
            f"Accuracy in %, {part['draws']} draws, 5 classes (BCCD: 3), 1, 5 and 10 examples of",
            "each, with 95% intervals over draws. ImageNet, which EfficientNet-Lite0 was trained",
            "on, contains classes of Caltech-101 and CIFAR. `euclidean`: the nearest mean of raw",
            "pixels, or of the features of a ProtoNet meta-trained on CIFAR-FS.",
            "",
            f"| network | head | {' | '.join(titles)} |",
            f"|{'---|' * (len(titles) + 2)}",
        ]
        for (network, head), own in cells.items():
            lines.append(f"| {network} | `{head}` | {' | '.join(own[one] for one in columns)} |")
        lines += ["", f"`{part['command']}`, commit {part['commit']}, {part['hardware']}.", ""]
    if "seconds" in content:
        part = content["seconds"]
        lines += [
            "Seconds of `metalearn predict`, start of Python and imports included; medians of 3.",
            "",
            "| classes | examples of each | other images | nothing cached | cached | images/s |",
            "|---|---|---|---|---|---|",
        ]
        for row in part["rows"]:
            lines.append(
                f"| {row['classes']} | {row['shots']} | {row['queries']} | {row['cold']:.1f} | "
                f"{row['cached']:.1f} | {row['images_per_s']:.0f} |"
            )
        lines += ["", f"`{part['command']}`, commit {part['commit']}, {part['hardware']}."]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure a part, and write both files."""
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    data, part = Path(given["data"]), given.get("part", "accuracy")
    draws = int(given.get("draws", 200))
    if part == "features":
        network: Any = open_network(_BACKBONE, None, False)
        with tempfile.TemporaryDirectory() as folder:
            images = images_of("CIFAR-100", data, Path(folder))
            features = [network.represent(paths[:_EACH]) for paths in images.values()]
        np.save(given["out"], np.stack(features))
        return
    if part == "accuracy":
        torch.set_num_threads(1)
    rows = (
        accuracy_rows(data, given.get("run"), draws) if part == "accuracy" else seconds_rows(data)
    )
    environment = describe_environment("cpu")
    content = json.loads(_OUT.read_text()) if _OUT.exists() else {}
    content[part] = {
        "rows": rows,
        "command": f"python scripts/benchmark_own_examples.py data=<folder> part={part}",
        "commit": environment["commit"],
        "hardware": environment["hardware"],
        **({"draws": draws} if part == "accuracy" else {}),
    }
    write_json(_OUT, content)
    _OUT.with_suffix(".md").write_text(_page(content))


if __name__ == "__main__":
    main()
