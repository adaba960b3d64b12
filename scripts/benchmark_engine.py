"""Measures what the engine's static rule rests on: strategies, chunks and the allocator, on CPU.

Writes benchmarks/engine.json and benchmarks/engine.md. Each figure is the median of repeated, alternating steps.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_OUT = Path(__file__).parent.parent / "benchmarks"
_REPEATS = 7


def cases() -> list[tuple[str, list[str]]]:
    train = "episode.train"
    return [
        (f"{algo} 5w1s, {query} queries", [f"algo={algo}", f"{train}.query={query}", "train.meta_batch=16"])
        for algo in ("maml", "anil")
        for query in (1, 5, 15)
    ] + [("protonet 60w1s, 5 queries", ["algo=protonet", f"{train}.way=60", f"{train}.query=5", "train.meta_batch=1"])]


def measure(keep_memory: bool) -> list[dict[str, Any]]:
    """Tasks a second of every case under every strategy, in this process."""
    import torch

    from metalearn import composition, config, engine
    from metalearn.algorithms.base import Algorithm
    from metalearn.build import build

    if not keep_memory:
        engine.prepare_process = lambda device, threads: None
    rows = []
    for name, overrides in cases():
        run = build(config.checked(composition.composed(["dataset=glyphs", "logger=none", *overrides])))
        batch = run.config.train.meta_batch
        tasks, progress = run.train.draw(0, batch), torch.zeros(())
        variants = {("loop", 1)} | {("vmap", chunk) for chunk in {min(4, batch), min(8, batch), batch}}
        if type(run.algorithm).loss is Algorithm.loss:
            variants |= {("mixed", chunk) for chunk in {min(8, batch), batch}}
        engines = {v: dataclasses.replace(run.train_engine, strategy=v[0], chunk=v[1]) for v in sorted(variants)}
        seconds: dict[tuple[str, int], list[float]] = {variant: [] for variant in engines}
        for repeat in range(_REPEATS + 1):
            for variant, candidate in engines.items():
                start = time.perf_counter()
                candidate.step(run.state, tasks, progress)
                if repeat:  # the first warms up
                    seconds[variant].append(time.perf_counter() - start)
        for variant, times in seconds.items():
            chosen = (run.train_engine.strategy, run.train_engine.chunk)
            rows.append(
                {
                    "case": name, "strategy": variant[0], "chunk": variant[1], "keep_memory": keep_memory,
                    "tasks_per_second": batch / statistics.median(times),
                    "slowest": batch / max(times), "fastest": batch / min(times),
                    "strategy_chosen": chosen[0] == variant[0],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1] == "keep")))
        return
    from metalearn.report import environment

    rows = []
    for mode in ("plain", "keep"):  # in processes of their own: an allocator cannot be set back
        done = subprocess.run(
            [sys.executable, __file__, mode], capture_output=True, text=True, check=True, env=os.environ
        )
        rows += json.loads(done.stdout.splitlines()[-1])
    where = environment("cpu")
    _OUT.mkdir(exist_ok=True)
    (_OUT / "engine.json").write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Strategies of the engine on CPU",
        "",
        f"`make benchmark-engine`: training tasks a second, median of {_REPEATS} (slowest to fastest), second order, Conv4-64.",
        f"Commit {where['commit']}, {where['hardware']}, torch {where['versions']['torch']}. In bold: what `engine.strategy=auto` picks.",
        "",
        "| case | strategy | chunk | memory kept | memory returned |",
        "|---|---|---|---|---|",
    ]
    plain = {(r["case"], r["strategy"], r["chunk"]): r for r in rows if not r["keep_memory"]}
    for row in rows:
        if row["keep_memory"]:
            other = plain[row["case"], row["strategy"], row["chunk"]]
            mark = "**" if row["strategy_chosen"] else ""
            cells = [f"{r['tasks_per_second']:.1f} ({r['slowest']:.1f} to {r['fastest']:.1f})" for r in (row, other)]
            lines.append(
                f"| {row['case']} | {mark}{row['strategy']}{mark} | {row['chunk']} | {cells[0]} | {cells[1]} |"
            )
    (_OUT / "engine.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
