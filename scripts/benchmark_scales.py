"""Compare scales of ProtoNet's logits on three datasets: letters in fonts, Caltech-101, CIFAR-FS.

python scripts/benchmark_scales.py caltech101=<folder or zip> cifar100=<folder> [key=value …]

The letters are rendered from the fonts of this system (Debian: packages fonts-*). Each run is in
outputs/benchmark/scales/<dataset>/<scale>-seed<seed>/; a finished one with the same settings is
skipped, an interrupted one resumed. First, every scale is trained with seed 0 and compared on
validation classes only. Then the default and a temperature of 1 are trained with three seeds and
compared on test classes. Writes benchmarks/scales.json and the tables in docs/results.md.
"""

import dataclasses
import json
import string
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_methods import run
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.algorithms.geometry import squared_distance
from metalearn.algorithms.protonet import ProtoNet
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

_SETTINGS = [
    "algo=protonet", "episode=5w1s", "train.steps=300", "val.every=300", "val.episodes=200",
    "test.episodes=400", "engine.threads=1",
]  # fmt: skip
#: Numbers are those for the 256 features that all three datasets have here.
_CANDIDATES = {
    "one": ["algo.temperature=1"],
    "root": ["algo.temperature=16"],
    "quarter": ["algo.temperature=64"],
    "features": ["algo.temperature=256"],
    "learned": ["algo._target_=benchmark_scales.LearnedScale", "plugins=[benchmark_scales]"],
}


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


def train(folder: Path, name: str, overrides: list[str], more: list[str]) -> dict[str, Any]:
    """Train one run; return its result and its validation accuracy."""
    result = run(folder / name, [*overrides, *_SETTINGS], more)
    rows = [json.loads(line) for line in (folder / f"{name}/metrics.jsonl").open()]
    return {"result": result, "val": rows[-1]["val.accuracy"]}


def main() -> None:
    """Train all runs and write the results and tables."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    data = {name: Path(options.pop(name)).resolve() for name in ("caltech101", "cifar100")}
    more = [f"{key}={value}" for key, value in options.items()]
    letters = (_RUNS / "fonts").resolve()
    paths = fonts()
    if not letters.exists():
        render(letters, paths)
    datasets = {
        "letters in fonts": ["dataset=folder", f"dataset.path={letters}"],
        "Caltech-101": ["dataset=folder", f"dataset.path={data['caltech101']}"],
        "CIFAR-FS": ["dataset=cifar_fs", f"dataset.path={data['cifar100']}"],
    }
    chosen: dict[str, Any] = {}
    for dataset, overrides in datasets.items():
        for name, scale in _CANDIDATES.items():
            folder = _RUNS / dataset.replace(" ", "_").lower()
            one = train(folder, f"{name}-seed0", [*overrides, *scale, "seed=0"], more)
            chosen.setdefault(name, {})[dataset] = one
            print(dataset, name, one["val"], flush=True)


if __name__ == "__main__":
    main()
