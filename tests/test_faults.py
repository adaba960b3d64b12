"""Full disks, closed or limited outputs, a removed run folder, W&B without a network."""

import io
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from rich.console import Console

from metalearn.config.checking import check_config
from metalearn.report import wandb_run
from metalearn.report.console import open_console, print_line
from metalearn.report.tables import result_table
from metalearn.report.tracker import Tracker
from metalearn.run.train import train
from metalearn.system import output
from metalearn.system.atomic import atomic_writer
from metalearn.system.errors import RunFailed
from tests.fixtures import SMALL


@pytest.fixture
def file_limit():
    """Limit the size of files that this process writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_a_system_error_at_any_size(tmp_path, file_limit):
    content = {f"layer{n}": torch.zeros(64, 64, 3, 3) for n in range(4)}
    (tmp_path / "x.pt").write_text("old")
    for size in (*range(0, 4096, 512), *range(4096, 590_000, 48_000)):
        file_limit(size)
        with (
            pytest.raises(OSError, match="File too large"),
            atomic_writer(tmp_path / "x.pt") as stream,
        ):
            torch.save(content, stream)
        assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
        assert (tmp_path / "x.pt").read_text() == "old"
    with pytest.raises(RuntimeError, match="own"), atomic_writer(tmp_path / "y"):
        raise RuntimeError("own")


def test_removed_run_folder_ends_the_run(compose, tmp_path, monkeypatch):
    log = Tracker.log

    def remove_after_two_steps(tracker, row):
        log(tracker, row)
        if row["step"] == 2:
            shutil.rmtree(tmp_path / "x")
            if is_made_again:
                (tmp_path / "x/checkpoints").mkdir(parents=True)

    monkeypatch.setattr(Tracker, "log", remove_after_two_steps)
    config = compose("algo=protonet", "train.steps=4", "train.log_every=1", "checkpoint.every=3")
    is_made_again = False
    with pytest.raises(RunFailed, match="x was removed while the run was writing to it"):
        train(config, tmp_path / "x", "a run", [], Console(quiet=True))
    assert not (tmp_path / "x").exists()
    is_made_again = True
    with pytest.raises(RunFailed, match=r"config\.yaml: No such file"):
        train(config, tmp_path / "x", "a run", [], Console(quiet=True))
    assert not (tmp_path / "x/result.json").exists()


def test_characters_that_the_output_lacks_are_replaced(monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    output.prepare_streams()
    print("90% ± 1%, 1–2… ≤ 3×4 é\udcff", flush=True)
    print("± ü", file=sys.stderr, flush=True)
    print_line(open_console(), "± \udcff")
    open_console().print(result_table([{"a": "1 ± 2"}, {"a": "12345 ± 67"}]))
    lines = streams[0].buffer.getvalue().decode("ascii").splitlines()
    assert lines[:2] == ["90% +- 1%, 1-2... <= 3x4 \\xe9\\udcff", "+- \\udcff"]
    assert len({len(line) for line in lines[2:] if line.strip()}) == 1  # columns are aligned
    assert streams[1].buffer.getvalue() == b"+- \\xfc\n"


def test_output_that_fails_ends_no_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        console = open_console()
        for _ in range(3):
            console.print("a line")
        full.flush()


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">/dev/full", 1, "metalearn: No space left on device\n"),
        (">&-", 0, ""),
        ("<&- >&-", 0, ""),
    ],
)
def test_command_with_closed_or_full_output(redirection, code, error, tmp_path):
    command = f"exec {sys.executable} -m metalearn list {redirection}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (code, error)


def test_opened_files_do_not_get_the_numbers_of_closed_streams(tmp_path):
    code = (
        "import os; from metalearn.system import output; output.prepare_streams();"
        "os.system('echo child'); print('own', flush=True);"
        f"file = open({str(tmp_path / 'x')!r}, 'w'); os.system('echo child');"
        "assert file.fileno() > 2"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec {sys.executable} -c "$1" <&- >&- 2>&-', "sh", code], cwd=tmp_path
    )
    assert done.returncode == 0 and (tmp_path / "x").read_text() == ""


@pytest.mark.slow
def test_run_without_output_finishes(cache_dir, tmp_path):
    arguments = ["train", "algo=protonet", *SMALL, f"cache_dir={cache_dir}", "hydra.run.dir=x"]
    words = " ".join(f"'{word}'" for word in arguments)
    command = f"exec {sys.executable} -m metalearn {words} >/dev/full 2>&-"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "x/result.json").exists()


class StartedRun:
    """What wandb.init returns."""

    url = "https://…"


@pytest.fixture
def wandb_server(monkeypatch):
    """Configure a key of W&B and the address of its server."""
    teardown = wandb.teardown
    teardown()

    def configure(address):
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.delenv("WANDB_MODE", raising=False)

    yield configure
    teardown()


def _wandb_run(compose, folder, notes):
    return wandb_run.WandbRun(
        project="metalearn", entity=None, folder=folder, identifier="abc",
        config=check_config(compose()), note=notes.append,
    )  # fmt: skip


def test_wandb_without_a_network_is_offline_from_the_start(
    compose, tmp_path, monkeypatch, wandb_server
):
    wandb_server("http://127.0.0.1:9")
    started: list[Any] = []
    notes: list[str] = []

    def init(mode, dir, **settings):
        started.append((mode, dir))
        return StartedRun()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    _wandb_run(compose, Path("x"), notes)
    # Absolute, because the service may be that of another process, in another directory.
    assert started == [("offline", tmp_path / "x")]
    assert len(notes) == 1 and "http://127.0.0.1:9 cannot be reached" in notes[0]
    assert "wandb sync x/wandb/offline-run-*" in notes[0]


def test_wandb_that_cannot_start_online_is_stopped_before_it_starts_offline(
    compose, tmp_path, monkeypatch, server, wandb_server
):
    wandb_server(server[0])
    events: list[str] = []
    notes: list[str] = []

    def init(mode, **settings):
        events.append(mode)
        if mode == "online":
            raise ValueError("the key is wrong")
        return StartedRun()

    def teardown():
        events.append("teardown")
        raise SystemExit(1)  # as W&B does if its service has failed

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("wandb.teardown", teardown)
    _wandb_run(compose, tmp_path, notes)
    assert events == ["online", "teardown", "offline"]
    assert len(notes) == 1 and "going online failed: the key is wrong" in notes[0]


def test_started_processes_are_silent_only_where_asked(capfd):
    with wandb_run._silent_children():
        os.system("echo hidden; echo hidden >&2")
    os.system("echo shown")
    assert capfd.readouterr() == ("shown\n", "")
