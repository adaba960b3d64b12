"""Compare scales of the logits of ProtoNet and ProtoMAML: letters in fonts, Caltech-101, CIFAR-FS.

python scripts/benchmark_scales.py caltech101=<folder or zip> cifar100=<folder> [key=value …]

The letters are rendered from the fonts of this system (Debian: packages fonts-*). Each run is in
outputs/benchmark/scales/<dataset>/<scale>-seed<seed>/; a finished one with the same settings is
skipped, an interrupted one resumed. The tables are written after each method and dataset. First,
every scale of ProtoNet is trained with seed 0 and
compared on validation classes. Then the default and a temperature of 1 are trained with three seeds
and compared on test classes. Writes benchmarks/scales.json and the tables in docs/results.md.
"""

import dataclasses
import json
import statistics
import string
import sys
from pathlib import Path
from typing import Any

import torch
from pages import ROOT, fill
from PIL import Image, ImageDraw, ImageFont
from runs import run
from torch import Tensor

from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.protonet import ProtoNet
from metalearn.report import tables
from metalearn.report.scores import read_scores
from metalearn.report.stats import Difference, paired_difference
from metalearn.report.tables import format_difference
from metalearn.system.atomic import write_json
from metalearn.tasks.types import Params, Spec

_RUNS = Path("outputs/benchmark/scales")
_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts")
_NUM_FONTS = 30
_UPRIGHT = ("Regular", "Book", "Roman", "Medium")
_LETTERS = {
    f"{kind}_{letter}": letter
    for kind, letters in (("lower", string.ascii_lowercase), ("upper", string.ascii_uppercase))
    for letter in letters
}

_COMMON = ["episode=5w1s", "engine.threads=1"]
_PROTONET = [
    "algo=protonet", "train.steps=300", "val.every=300", "val.episodes=200", "test.episodes=400",
]  # fmt: skip
_PROTO_MAML = [
    "algo=proto_maml", "train.steps=30", "train.meta_batch=4", "episode.train.query=5",
    "val.every=30", "val.episodes=50", "test.episodes=200",
]  # fmt: skip
#: Numbers are those for the 256 features that all three datasets have here.
_CANDIDATES = {
    "one": ["algo.temperature=1"],
    "root": ["algo.temperature=16"],
    "quarter": ["algo.temperature=64"],
    "features": ["algo.temperature=256"],
    "learned": ["algo._target_=benchmark_scales.LearnedScale", "plugins=[benchmark_scales]"],
}
_MEANING = {
    "one": "1", "root": "sqrt(D)", "quarter": "D / 4", "features": "D",
    "learned": "learned, starts at D",
}  # fmt: skip
_SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedScale(ProtoNet):
    """ProtoNet whose logits are divided by a learned number that starts at the features' number."""

    def init_head(self, spec: Spec, size: int, key: Tensor) -> Params:
        """Create the logarithm of the divisor."""
        return {"head.log_scale": torch.full((), float(size), device=key.device).log()}

    def compare(self, weights: Params, learned: Tensor, z: Tensor) -> Tensor:
        """Divide the negative squared distances."""
        return -squared_distance(z, learned) / weights["head.log_scale"].exp()


def fonts() -> list[Path]:
    """Return one font per folder of the system's fonts that has all letters, the first by name."""
    folders: dict[Path, list[Path]] = {}
    for folder in _FONT_FOLDERS:
        for path in sorted(Path(folder).rglob("*.[ot]tf")):
            folders.setdefault(path.parent, []).append(path)
    chosen: dict[str, Path] = {}
    for _, paths in sorted(folders.items()):
        fonts = {path: ImageFont.truetype(str(path), 24) for path in paths}
        path = min(
            paths,
            key=lambda path: (fonts[path].getname()[1] not in _UPRIGHT, fonts[path].getname()),
        )
        masks = {bytes(fonts[path].getmask(letter)) for letter in _LETTERS.values()}
        if len(masks) > len(_LETTERS) - 6:  # letters that it lacks would all look the same
            chosen.setdefault(str(fonts[path].getname()[0]), path)
    return list(chosen.values())[:_NUM_FONTS]


def render(folder: Path, paths: list[Path]) -> None:
    """Write every letter in every font as a PNG of 32 x 32 pixels, in a folder per letter."""
    for name, letter in _LETTERS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            image = Image.new("L", (32, 32), 255)
            font = ImageFont.truetype(str(path), 24)
            ImageDraw.Draw(image).text((16, 24), letter, fill=0, font=font, anchor="ms")
            image.save(folder / name / f"{path.stem}.png")


def train(folder: Path, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """Train one run; return its validation and test accuracy and how it was made."""
    result = run(folder, [*_COMMON, *overrides], more)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {
        "val": json.loads(lines[-1])["val.accuracy"],
        "test": result["test"]["accuracy"],
        "seconds": result["seconds"],
        "overrides": [word for word in overrides if not word.startswith("dataset.path=")],
        "protocol_id": result["protocol_id"],
        "environment": result["environment"],
    }


def compare(folder: Path, prefix: str, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """Train a method with a temperature of 1 and with its default, with all seeds.

    Returns:
        The runs by scale, and for each seed the paired difference over test episodes.
    """
    content: dict[str, Any] = {"one": [], "default": [], "default minus one": []}
    for seed in _SEEDS:
        scores = []
        for scale, words in {"one": ["algo.temperature=1"], "default": []}.items():
            name = folder / f"{prefix}{scale}-seed{seed}"
            content[scale].append(train(name, [*overrides, *words, f"seed={seed}"], more))
            scores.append(read_scores(name / "test_scores.csv"))
        difference = paired_difference(scores[1], scores[0])
        content["default minus one"].append(dataclasses.asdict(difference))
        print(folder.name, prefix, seed, difference, flush=True)
    return content


def _percent(values: list[float]) -> str:
    return f"{100 * statistics.mean(values):.1f}%"


def write(content: dict[str, Any]) -> None:
    """Write the results and the tables."""
    write_json(ROOT / "benchmarks/scales.json", content)
    selection, comparison = content["selection"], content["comparison"]
    chosen = [
        {"ProtoNet's distances divided by": _MEANING[scale]}
        | {dataset: _percent([runs[scale]["val"]]) for dataset, runs in selection.items()}
        for scale in _CANDIDATES
    ]
    rows = [
        {
            "method, data": name,
            "temperature 1": _percent([one["test"]["mean"] for one in runs["one"]]),
            "default": _percent([one["test"]["mean"] for one in runs["default"]]),
            **{
                f"difference, seed {seed}": format_difference("accuracy", Difference(**difference))
                for seed, difference in zip(_SEEDS, runs["default minus one"], strict=True)
            },
        }
        for name, runs in comparison.items()
    ]
    environments = {
        (one["environment"]["hardware"], one["environment"]["versions"]["torch"])
        for runs in comparison.values()
        for one in runs["one"] + runs["default"]
    }
    commits = {
        one["environment"]["commit"]
        for runs in comparison.values()
        for one in runs["one"] + runs["default"]
    }
    lines = [
        *tables.markdown_table(chosen),
        "",
        "Validation accuracy, seed 0, which chose the default. Test accuracy, mean of three seeds:",
        "",
        *tables.markdown_table(rows),
        "",
        f"Commits {', '.join(sorted(commits))}; "
        + "; ".join(f"{hardware}, torch {torch}" for hardware, torch in sorted(environments)),
    ]
    fill(ROOT / "docs/results.md", "scales: written by scripts/benchmark_scales.py", lines)


def main() -> None:
    """Train all runs and write the results and tables."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    data = {name: Path(options.pop(name)).resolve() for name in ("caltech101", "cifar100")}
    more = [f"{key}={value}" for key, value in options.items()]
    letters, paths = (_RUNS / "fonts").resolve(), fonts()
    if not letters.exists():
        render(letters, paths)
    datasets = {
        "letters in fonts": ["dataset=folder", f"dataset.path={letters}"],
        "Caltech-101": ["dataset=folder", f"dataset.path={data['caltech101']}"],
        "CIFAR-FS": ["dataset=cifar_fs", f"dataset.path={data['cifar100']}"],
    }
    selection: dict[str, Any] = {}
    comparison: dict[str, Any] = {}
    folders = {name: _RUNS / name.replace(" ", "_").lower() for name in datasets}
    for name, overrides in datasets.items():
        selection[name] = {
            scale: train(
                folders[name] / f"{scale}-seed0", [*_PROTONET, *overrides, *words, "seed=0"], more
            )
            for scale, words in _CANDIDATES.items()
        }
    families = [path.stem for path in paths]
    cases = [("protonet", name, "", _PROTONET) for name in datasets]
    cases += [
        ("proto_maml", name, "proto_maml-", _PROTO_MAML)
        for name in ("letters in fonts", "Caltech-101")
    ]
    for method, name, prefix, overrides in cases:
        own = compare(folders[name], prefix, [*overrides, *datasets[name]], more)
        comparison[f"{method}, {name}"] = own
        write({"fonts": families, "selection": selection, "comparison": comparison})


if __name__ == "__main__":
    main()
