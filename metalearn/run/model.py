"""Make a model of a finished run: weights, settings, result and card, small enough to share."""

import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from metalearn.config import checking, choices, composition
from metalearn.report.folder import RunFolder
from metalearn.report.result import Result
from metalearn.report.tables import format_score
from metalearn.run import checkpoint
from metalearn.system.atomic import write_text
from metalearn.system.errors import UserError


def export_model(run: Path, out: Path | None = None) -> Path:
    """Write a model, which commands take like the run's folder.

    Args:
        run: Folder of a finished run.
        out: Folder to write; None: models/<algo>-<dataset>.

    Returns:
        The folder.

    Raises:
        UserError: If the run is not finished, or the folder exists.
    """
    source = RunFolder(run)
    if not source.is_finished:
        raise source.unfinished()
    result = source.read_result()
    folder = out or Path("models", result.name.replace(" ", "-"))
    if folder.exists():
        raise UserError(f"out={folder} exists; choose another, or remove it")
    content = checkpoint.load(source.best, torch.device("cpu"))
    settings = checking.plain(checking.check_config(composition.load_config(run)))
    settings |= {"data_dir": None, "cache_dir": None, "logger": {}, "resume": "never"}
    settings["engine"]["choices"] = None
    words = shlex.split(result.training["command"])
    result.training["command"] = shlex.join(one for one in words if not one.startswith(_PATHS))
    model = RunFolder(folder)
    try:
        folder.mkdir(parents=True)
        checkpoint.save_model(model.model, content)
        write_text(model.config, yaml.safe_dump(settings, sort_keys=False))
        write_text(model.card, _card(folder, result, settings))
        result.write(model.result)  # last: it marks the model as complete
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


#: Arguments that name folders of a machine.
_PATHS = ("data_dir=", "cache_dir=", "hydra.run.dir=")


def _card(folder: Path, result: Result, settings: dict[str, Any]) -> str:
    """Return a Markdown page about a model; its first line is what `metalearn list` shows."""
    algo, _, dataset = result.name.partition(" ")
    data = choices.stored_values("dataset", dataset)
    method = choices.options("algo")[algo]
    network = settings["backbone"]["_target_"].rpartition(".")[2]
    environment, training = result.environment, result.training
    score = f"{result.metric} {format_score(result.metric, result.test)}"
    steps = f"step {training['best_step']:,} of {training['steps']:,}"
    rows = {
        "method": f"{method} `algo={algo}`, network {network}",
        "data": f"`dataset={dataset}`: {data.get('source', '')}",
        "protocol": f"{result.shape}, statistics {result.protocol['statistics']}, "
        f"{result.test.episodes:,} test episodes, `{result.protocol_id}`",
        "result": f"{score}: mean and 95% interval over episodes, one run, seed {result.seed}",
        "weights": f"of {steps}, the best on validation",
        "command": f"`{training['command']}`",
        "made with": f"commit {environment['commit']}, {environment['hardware']}, "
        f"{result.seconds / 60:.0f} minutes",
        "licence": "weights: MIT, as metalearn. They contain no image of the training data, whose "
        f"licence is: {data.get('licence', 'unknown')}",
    }
    lines = [f"# {algo} on {dataset}: {score} ({result.shape})", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {text} |" for name, text in rows.items()]
    run = f"run={folder.as_posix()}"
    uses = [f"predict {run} support=<examples> query=<images>", f"evaluate {run}", f"serve {run}"]
    return "\n".join([*lines, "", "```", *(f"metalearn {use}" for use in uses), "```", ""])
