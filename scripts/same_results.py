"""Check that the current code trains and tests bit for bit as another commit does.

python scripts/same_results.py base=<commit> [only=maml]

A worktree of the commit is made in a temporary folder. Both trees run the same small commands, with one thread, on this machine;
weights, buffers and test scores are compared. Nothing is recorded: use it before and after a change that must change no number.
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
    "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=16", "backbone.filters=8", "backbone.halvings=3",
    "episode.query=3", "train.steps=6", "train.meta_batch=3", "train.batch_size=16", "train.log_every=3", "val.every=3",
    "val.episodes=6", "test.episodes=8", "logger=none", "engine.threads=1", "device=cpu",
)  # fmt: skip
_SINUSOID = (
    "dataset=sinusoid",
    *(word for word in _SMALL if not word.startswith(("dataset", "backbone", "episode"))),
)

#: Commands by name: episodes, batches, the four statistics, regression, each kind of objective.
CASES: dict[str, tuple[str, ...]] = {
    "maml": ("algo=maml", *_SMALL),
    "maml-support": ("algo=maml", "statistics=support", *_SMALL),
    "maml-support_plus_one": ("algo=maml", "statistics=support_plus_one", *_SMALL),
    "maml-population": ("algo=maml", "statistics=population", "train.schedule=cosine", *_SMALL),
    "maml-vmap": ("algo=maml", "engine.strategy=vmap", "algo.inner_steps=2", "dataset.rotations=episode", *_SMALL),
    "anil-rematerialise": ("algo=anil", "engine.rematerialise=true", *_SMALL),
    "maml_pp": ("algo=maml_pp", "algo.multi_step_share=0.5", *_SMALL),
    "meta_sgd": ("algo=meta_sgd", "train.clip_norm=1", *_SMALL),
    "proto_maml": ("algo=proto_maml", *_SMALL),
    "imaml": ("algo=imaml", *_SMALL),
    "reptile": ("algo=reptile", *_SMALL),
    "protonet": ("algo=protonet", "episode.train.way=9", "episode.shot=2", *_SMALL),
    "protonet-query": ("algo=protonet", "statistics=query", "dataset.rotations_may_meet=false", *_SMALL),
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
        *(word for word in _SMALL if not word.startswith("backbone")),
    ),
    "sinusoid-maml": ("algo=maml", "algo.test_inner_steps=1", *_SINUSOID),
    "sinusoid-finetune": ("algo=finetune", *_SINUSOID),
}  # fmt: skip
#: Cases that may differ by rounding, and by how much.
_TOLERANCE = {"reptile": 1e-6}

#: Runs several commands in one process; works for any layout of the package.
_DRIVER = """
import json, runpy, sys
for name, words in json.load(open(sys.argv[1])).items():
    sys.argv = ["metalearn", "train", *words, f"hydra.run.dir={name}"]
    try:
        runpy.run_module("metalearn", run_name="__main__")
    except SystemExit as leaving:
        if leaving.code:
            sys.exit(f"{name} ended with exit code {leaving.code}")
"""


def start(tree: Path, folder: Path, cases: dict[str, tuple[str, ...]]) -> subprocess.Popen[bytes]:
    """Run the cases with the code of a tree; each case writes its run into a folder of its name."""
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
    """Compare two finished runs: the largest absolute difference of any number, and where it is."""
    worst, place = 0.0, ""
    for name in ("last.pt", "best.pt"):
        contents = [
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (first, second)
        ]
        for part in ("meta", "fixed"):
            if contents[0][part].keys() != contents[1][part].keys():
                return float("inf"), f"{name} {part}: other names"
            for key, value in contents[0][part].items():
                difference = (
                    float((value - contents[1][part][key]).abs().max()) if value.numel() else 0.0
                )
                if not difference <= worst:
                    worst, place = difference, f"{name} {part} {key}"
    if (first / "test_scores.csv").read_text() != (second / "test_scores.csv").read_text():
        return max(worst, 1.0), f"{place} and test_scores.csv"
    return worst, place


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if "base" not in given:
        sys.exit(__doc__)
    cases = {name: words for name, words in CASES.items() if given.get("only", "") in name}
    failed = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--detach", "-q", place / "tree", given["base"]],
            check=True,
        )
        try:
            trees = {"base": place / "tree", "here": ROOT}
            running = {side: start(tree, place / side, cases) for side, tree in trees.items()}
            for side, process in running.items():
                if process.wait():
                    sys.exit(f"{side} failed:\n{(place / side / 'log.txt').read_text()[-3000:]}")
            for case in cases:
                difference, where = largest_difference(place / "base" / case, place / "here" / case)
                same = difference <= _TOLERANCE.get(case, 0.0)
                print(
                    f"{case:<24} {'same' if same else 'DIFFERS'} {f'{difference:.1e} at {where}' if difference else ''}"
                )
                failed += [] if same else [case]
        finally:
            subprocess.run(
                ["git", "-C", ROOT, "worktree", "remove", "--force", place / "tree"], check=True
            )
    print(
        f"{len(cases) - len(failed)} of {len(cases)} cases give the same results as {given['base']}"
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
