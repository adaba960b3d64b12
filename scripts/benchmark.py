"""Run the gates of published results one after the other and print one table.

python scripts/benchmark.py [budget=day] [seeds=0,1,2] [only=protonet,omniglot] [key=value …]

The order is that of conf/gates.yaml, by value, all gates with the first seed first; `only` takes
the gate with that name, or those whose name has all the given parts. Each run is in
outputs/benchmark/<budget>/<experiment>-seed<seed>/. A gate whose training is that of a finished run
there is tested with that run. A finished run with the same settings is
skipped, an interrupted one resumed: repeat the command. After each run its result is written to
benchmarks/results/, its tests are logged in benchmarks/results/tests.jsonl, and the tables of
docs/results.md are written.
"""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import results
from runs import make_room

from metalearn.cli.reproduce import Recipe
from metalearn.config import gates
from metalearn.report.folder import RunFolder
from metalearn.system.errors import UserError
from metalearn.system.lock import alone_in


def main() -> None:
    """Run the gates of a budget, one run at a time, and write the tables after each."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    budget, only = options.pop("budget", "day"), options.pop("only", "")
    seeds = options.pop("seeds", options.pop("seed", "0")).split(",")
    names = [name for name in gates.gates() if all(part in name for part in only.split(","))]
    names = [only] if only in names else names
    if not names:
        sys.exit(f"only={only}: no such gate; choose from {', '.join(gates.gates())}")
    root = Path("outputs/benchmark")
    root.mkdir(parents=True, exist_ok=True)
    failed, table = [], list[str]()
    with alone_in(root):
        for number, (seed, name) in enumerate(itertools.product(seeds, names), 1):
            print(f"\n[{number}/{len(seeds) * len(names)}] {name}, seed {seed}", flush=True)
            folder = root / budget / f"{name}-seed{seed}"
            try:
                recipe = Recipe(name, budget)
            except UserError as error:  # a gate without this budget
                print(f"left out: {error}")
                continue
            verdict = run(recipe, folder, {"logger": "none", **options, "seed": seed})
            if json.loads(verdict.read_text())["outcome"] == "FAIL":
                failed.append(f"{name} seed {seed}")
            results.collect(verdict.parent, measured=False, experiment=name)
            table = results.write_tables()
    print("\n" + "\n".join(table))
    if failed:
        sys.exit(f"FAIL: {', '.join(failed)}")


def run(recipe: Recipe, folder: Path, settings: dict[str, str]) -> Path:
    """Run one gate, or resume it, unless it is finished; return the file with the verdict."""
    overrides = [f"{key}={value}" for key, value in settings.items()]
    make_room(folder, recipe.overrides(overrides))
    other, changes = same_training(recipe, folder)
    if other is None:
        verdict = RunFolder(folder).reproduction
        is_finished = verdict.exists()
        more = ["resume=auto", f"hydra.run.dir={folder}", *overrides]
    else:
        verdict, more = RunFolder(other).reproduction_of(recipe.name), [f"run={other}"]
        is_finished = verdict.exists() and json.loads(verdict.read_text()).get("changes") == changes
    if is_finished:
        print(f"already finished: {verdict.parent}")
    else:
        verdict.unlink(missing_ok=True)
        words = ["reproduce", recipe.name, f"budget={recipe.budget}", *more]
        done = subprocess.run([sys.executable, "-m", "metalearn", *words])
        if not verdict.exists():
            sys.exit(f"{recipe.name} ended with exit code {done.returncode}; run this again")
    return verdict


def same_training(recipe: Recipe, folder: Path) -> tuple[Path | None, list[str]]:
    """Return a finished run beside `folder` with the same training and seed, and `changes` to it.

    None if there is none, or if the gate has begun to train itself.
    """
    seed = folder.name.rpartition("-")[2]
    if not RunFolder(folder).is_started:
        for other in sorted(folder.parent.glob(f"*-{seed}")):
            with contextlib.suppress(UserError):  # another training, or not finished
                return other, recipe.changes(other)
    return None, []


if __name__ == "__main__":
    try:
        main()
    except UserError as error:  # such as another process that runs the gates
        sys.exit(str(error))
