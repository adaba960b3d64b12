"""Check that the current code gives the same results as a different commit, bit for bit.

python scripts/same_results.py base=<commit> [only=maml]

Creates a worktree of the commit in a temporary folder, runs the same small commands with both trees
on one thread, and compares weights, buffers and test scores. Writes nothing. Use it to check a
change that must not change any number.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from pages import ROOT

_SMALL = (
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8",
    "backbone.halvings=3", "episode.query=3", "train.steps=6", "train.meta_batch=3",
    "train.batch_size=16", "train.log_every=3", "val.every=3", "val.episodes=6", "test.episodes=8",
    "logger=none", "engine.threads=1", "device=cpu",
)  # fmt: skip
_SINUSOID = (
    "dataset=sinusoid",
    *(arg for arg in _SMALL if not arg.startswith(("dataset", "backbone", "episode"))),
)

#: Overrides by case; they cover episodes, batches, the four statistics, regression, each objective.
CASES: dict[str, tuple[str, ...]] = {
    "maml": ("algo=maml", *_SMALL),
    "maml-support": ("algo=maml", "statistics=support", *_SMALL),
    "maml-support_plus_one": ("algo=maml", "statistics=support_plus_one", *_SMALL),
    "maml-population": ("algo=maml", "statistics=population", "train.schedule=cosine", *_SMALL),
    "maml-vmap": (
        "algo=maml", "engine.strategy=vmap", "algo.inner_steps=2", "dataset.rotations=episode",
        *_SMALL,
    ),
    "anil-rematerialise": ("algo=anil", "engine.rematerialise=true", *_SMALL),
    "maml_pp": ("algo=maml_pp", "algo.multi_step_share=0.5", *_SMALL),
    "meta_sgd": ("algo=meta_sgd", "train.clip_norm=1", *_SMALL),
    "proto_maml": ("algo=proto_maml", *_SMALL),
    "imaml": ("algo=imaml", *_SMALL),
    "reptile": ("algo=reptile", *_SMALL),
    "protonet": ("algo=protonet", "episode.train.way=9", "episode.shot=2", *_SMALL),
    "protonet-query": (
        "algo=protonet", "statistics=query", "dataset.rotations_may_meet=false", *_SMALL,
    ),
    "matching": ("algo=matching", "algo.full_context=true", *_SMALL),
    "relation": ("algo=relation", "train.optimiser=sgd", *_SMALL),
    "siamese": ("algo=siamese", "statistics=support", *_SMALL),
    "metanet": ("algo=metanet", *_SMALL),
    "mapping": ("algo=mapping", *_SMALL),
    "r2d2": ("algo=r2d2", *_SMALL),
    "baseline": ("algo=baseline", "train.schedule=step", "train.schedule_every=2", *_SMALL),
    "baseline_pp": ("algo=baseline_pp", *_SMALL),
    "rfs": ("algo=rfs", *_SMALL),
    "finetune": ("algo=finetune", *_SMALL),
    "resnet12": (
        "algo=protonet", "backbone=resnet12", "backbone.filters=[4,4,6]",
        *(arg for arg in _SMALL if not arg.startswith("backbone")),
    ),
    "sinusoid-maml": ("algo=maml", "algo.test_inner_steps=1", *_SINUSOID),
    "sinusoid-finetune": ("algo=finetune", *_SINUSOID),
}  # fmt: skip
#: Largest difference allowed for rounding, for cases that are not bit-for-bit equal.
_TOLERANCE = {"reptile": 1e-6}

#: Runs several commands in one process; independent of the package's layout.
_DRIVER = """
import json, runpy, sys
for name, overrides in json.load(open(sys.argv[1])).items():
    sys.argv = ["metalearn", "train", *overrides, f"hydra.run.dir={name}"]
    try:
        runpy.run_module("metalearn", run_name="__main__")
    except SystemExit as error:
        if error.code:
            sys.exit(f"{name} ended with exit code {error.code}")
"""


def start(tree: Path, folder: Path, cases: dict[str, tuple[str, ...]]) -> subprocess.Popen[bytes]:
    """Start the cases with the code of a tree; the run folder of a case is `folder`/<case>."""
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "METALEARN_CACHE": str(folder / "cache"),
    }
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _DRIVER, "cases.json"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )


def largest_difference(first: Path, second: Path) -> tuple[float, str]:
    """Return the largest absolute difference between two finished runs, and where it is."""
    largest, where = 0.0, ""
    for name in ("last.pt", "best.pt"):
        contents = [
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (first, second)
        ]
        for part in ("meta", "fixed"):
            if contents[0][part].keys() != contents[1][part].keys():
                return float("inf"), f"{name} {part}: different names"
            for key, value in contents[0][part].items():
                difference = (
                    float((value - contents[1][part][key]).abs().max()) if value.numel() else 0.0
                )
                if not difference <= largest:
                    largest, where = difference, f"{name} {part} {key}"
    if (first / "test_scores.csv").read_text() != (second / "test_scores.csv").read_text():
        return max(largest, 1.0), f"{where} and test_scores.csv"
    return largest, where


def main() -> None:
    """Run the cases with both trees, print each comparison, and exit with 1 if any differs."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    if "base" not in options:
        sys.exit(__doc__)
    cases = {name: case for name, case in CASES.items() if options.get("only", "") in name}
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run(
            [*git, "add", "--detach", "-q", folder / "tree", options["base"]], check=True
        )
        try:
            trees = {"base": folder / "tree", "here": ROOT}
            processes = {side: start(tree, folder / side, cases) for side, tree in trees.items()}
            for side, process in processes.items():
                if process.wait():
                    sys.exit(f"{side} failed:\n{(folder / side / 'log.txt').read_text()[-3000:]}")
            for case in cases:
                runs = folder / "base" / case, folder / "here" / case
                difference, where = largest_difference(*runs)
                is_same = difference <= _TOLERANCE.get(case, 0.0)
                at = f"{difference:.1e} at {where}" if difference else ""
                print(f"{case:<24} {'same' if is_same else 'DIFFERS'} {at}")
                failed += [] if is_same else [case]
        finally:
            subprocess.run([*git, "remove", "--force", folder / "tree"], check=True)
    same = f"{len(cases) - len(failed)} of {len(cases)} cases"
    print(f"{same} give the same results as {options['base']}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
