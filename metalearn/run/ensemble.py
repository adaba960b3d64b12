"""Test the mean of the predictions of several runs, or of several checkpoints of one."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from metalearn.report import tables
from metalearn.report.console import print_line
from metalearn.report.folder import RunFolder
from metalearn.report.result import hash_of
from metalearn.run.evaluate import open_request
from metalearn.run.measure import trained_state
from metalearn.system.errors import UserError


def evaluate_ensemble(
    folders: Sequence[Path], overrides: list[str], split: str, console: Console
) -> dict[str, Any]:
    """Test the mean of several predictions (of classes: of their probabilities).

    Of one run, the checkpoints that `checkpoint.keep` kept are averaged. The result is written into
    the evaluations of the first run. Arguments, returned value and errors are those of `evaluate`.
    """
    start = time.perf_counter()
    requests = [open_request(folder, overrides, split) for folder in folders]
    names = [str(folder) for folder in folders]
    files = [RunFolder(folder).best for folder in folders]
    if len(folders) == 1:
        files = RunFolder(folders[0]).all_kept()
        names = [str(file) for file in files]
        if len(files) < 2:
            raise UserError(
                f"ensemble=true: {folders[0]} has one checkpoint; name several runs, or train with "
                "checkpoint.keep=5 and validate several times"
            )
    runs = [request.run(request.statistics[0]) for request in requests]
    if not runs[0].family.predicts:
        raise UserError("ensemble=true: the tasks of these runs have no predictions to average")
    for folder, run in zip(folders, runs, strict=True):
        keys = sorted(runs[0].protocol.keys() | run.protocol.keys())
        other = [key for key in keys if runs[0].protocol.get(key) != run.protocol.get(key)]
        if other:
            raise UserError(
                f"ensemble=true: {folder} is tested under a different protocol than {folders[0]} "
                f"({', '.join(other)}); set these settings for all of them"
            )
    if len(folders) == 1:
        runs, folders = runs * len(files), list(folders) * len(files)
    states = [trained_state(*member) for member in zip(runs, folders, files, strict=True)]
    label = f"ensemble={len(names)}-{hash_of({'runs': names})[:4]}"
    request = dataclasses.replace(requests[0], variant=[*requests[0].variant, label])
    others = list(zip(runs, states, strict=True))[1:]
    prefix = request.file(runs[0].protocol_id, "_")
    result, _ = request.measure(runs[0], states[0], prefix, others=others)
    result.evaluation["ensemble"] = names
    result.seconds = time.perf_counter() - start
    file = request.file(result.protocol_id, ".json")
    result.write(file)
    rows = [
        tables.result_row(f"{one.own.name} ({one.files.path.name})", one.own)
        for one in requests
        if one.own.protocol_id == result.protocol_id
    ]
    rows.append(tables.result_row(f"ensemble of {len(names)}", result))
    console.print(tables.result_table(rows))
    print_line(console, f"  {file}")
    return {"results": [result.to_dict()], "files": [str(file)]}
