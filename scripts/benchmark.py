"""Runs recipes of published figures one after the other, skips what is done, and ends with one table.

python scripts/benchmark.py budget=quick [only=omniglot] [key=value …]

Each lies in outputs/benchmark/<budget>/<experiment>-seed<seed>/; a run that is done under the same settings is skipped, one
that was cut off is gone on with. Result files go to benchmarks/results/, and the tables of docs/results.md are written from them.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from omegaconf import OmegaConf

from metalearn import composition, config
from metalearn.errors import UserError
from metalearn.verbs.reproduce import VERDICT_FILE, Recipe, experiments
from metalearn.verbs.train import CONFIG_FILE


def make_room(folder: Path, overrides: list[str]) -> None:
    """Removes a run that was trained or is tested otherwise than these overrides now say, or that this version does not understand;
    one that is of them, finished or cut off, stays, for `resume=auto` to go on with.
    """
    if not (folder / CONFIG_FILE).exists():
        return
    wanted: Any = OmegaConf.create(config.plain(config.checked(composition.composed(overrides))))
    content: Any = OmegaConf.to_container(wanted)
    described = config.roles(content)
    try:
        stored: Any = composition.stored(folder)
    except UserError:
        shutil.rmtree(folder)
        return
    for key in {*config.leaves(wanted), *config.leaves(stored)}:
        has = config.role_of(key, described)[0]
        if has & {"identity", "protocol", "seed"} and OmegaConf.select(
            wanted, key
        ) != OmegaConf.select(stored, key):
            shutil.rmtree(folder)
            return


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    budget, only = given.pop("budget", "quick"), given.pop("only", "")
    names = (
        [name for name in experiments() if only in name.split("_")] if only else list(experiments())
    )
    if not names:
        sys.exit(f"only={only}: no such recipe; there are {', '.join(experiments())}")
    failed = []
    for number, name in enumerate(names, 1):
        folder = Path("outputs/benchmark") / budget / f"{name}-seed{given.get('seed', '0')}"
        print(f"\n[{number}/{len(names)}] {name}", flush=True)
        words = [f"{key}={value}" for key, value in {"logger": "none", **given}.items()]
        make_room(folder, Recipe(name, budget).overrides(words))
        if (folder / VERDICT_FILE).exists():
            print(f"done already: {folder}")
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
            done = subprocess.run([*command, f"hydra.run.dir={folder}", *words])
            if not (folder / VERDICT_FILE).exists():
                sys.exit(
                    f"{name} ended with exit code {done.returncode}; run this again to go on from here"
                )
        if json.loads((folder / VERDICT_FILE).read_text())["outcome"] == "FAIL":
            failed.append(name)
        results.collect(folder, measured=False)
    print("\n" + "\n".join(results.write_tables()))
    if failed:
        sys.exit(f"FAIL: {', '.join(failed)}")


if __name__ == "__main__":
    main()
