"""Run the recipes of published results one after the other and print one table.

python scripts/benchmark.py budget=quick [only=omniglot] [key=value …]

Each run is in outputs/benchmark/<budget>/<experiment>-seed<seed>/. A finished run with the same
settings is skipped, an interrupted one resumed. Result files are written to benchmarks/results/ and
from there into the tables of docs/results.md.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from omegaconf import OmegaConf

from metalearn.cli._arguments import take_plugins
from metalearn.cli.reproduce import Recipe
from metalearn.config import checking, composition, roles
from metalearn.report.folder import RunFolder
from metalearn.system.errors import UserError


def make_room(folder: Path, overrides: list[str]) -> None:
    """Delete a run whose training or test settings differ from these overrides.

    A run that this version cannot read is deleted too. A matching run, finished or interrupted,
    remains, so that `resume=auto` continues it.
    """
    if not RunFolder(folder).is_started:
        return
    config = checking.check_config(composition.compose_config(take_plugins(overrides)))
    expected: Any = OmegaConf.create(checking.plain(config))
    content: Any = OmegaConf.to_container(expected)
    all_roles = roles.roles(content)
    try:
        stored: Any = composition.load_config(folder)
    except UserError:
        shutil.rmtree(folder)
        return
    for key in {*checking.leaves(expected), *checking.leaves(stored)}:
        key_roles = roles.role_of(key, all_roles)[0]
        if key_roles & {"identity", "protocol", "seed"} and OmegaConf.select(
            expected, key
        ) != OmegaConf.select(stored, key):
            shutil.rmtree(folder)
            return


def main() -> None:
    """Run the recipes of a budget, write the tables, and exit with an error if any failed."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    budget, only = options.pop("budget", "quick"), options.pop("only", "")
    names = (
        [name for name in composition.reproductions() if only in name.split("_")]
        if only
        else list(composition.reproductions())
    )
    if not names:
        sys.exit(
            f"only={only}: no such recipe; choose from {', '.join(composition.reproductions())}"
        )
    failed = []
    for number, name in enumerate(names, 1):
        folder = Path("outputs/benchmark") / budget / f"{name}-seed{options.get('seed', '0')}"
        print(f"\n[{number}/{len(names)}] {name}", flush=True)
        overrides = [f"{key}={value}" for key, value in {"logger": "none", **options}.items()]
        make_room(folder, Recipe(name, budget).overrides(overrides))
        if RunFolder(folder).reproduction.exists():
            print(f"already finished: {folder}")
        else:
            command = [
                sys.executable,
                "-m",
                "metalearn",
                "reproduce",
                name,
                f"budget={budget}",
                "resume=auto",
            ]
            done = subprocess.run([*command, f"hydra.run.dir={folder}", *overrides])
            if not RunFolder(folder).reproduction.exists():
                sys.exit(f"{name} ended with exit code {done.returncode}; run this again to resume")
        if json.loads(RunFolder(folder).reproduction.read_text())["outcome"] == "FAIL":
            failed.append(name)
        results.collect(folder, measured=False)
    print("\n" + "\n".join(results.write_tables()))
    if failed:
        sys.exit(f"FAIL: {', '.join(failed)}")


if __name__ == "__main__":
    main()
