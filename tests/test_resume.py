"""A run that is stopped and gone on with ends as one that never was; what lies in its folder is never lost."""

import dataclasses
import io
import json
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from same_run import difference, left

from metalearn.cli import launch
from metalearn.run import checkpoint
from metalearn.run import train as verb
from metalearn.run.step import Meter, Training
from metalearn.system import lock, signals
from metalearn.system.errors import RunFailed, UserError
from tests.conftest import SMALL

_SHORT = [
    "train.steps=9",
    "val.every=4",
    "train.log_every=3",
    "checkpoint.every=2",
    "train.meta_batch=2",
    "train.batch_size=8",
]


class Halted(BaseException):
    """Stands for a kill."""


@pytest.fixture
def run(compose, tmp_path):
    """Trains in a folder; returns what is printed."""

    def trained(name, *words):
        said = io.StringIO()
        overrides = [*_SHORT, *words]
        verb.train(
            compose(*overrides), tmp_path / name, "a run", overrides, Console(file=said, width=300)
        )
        return said.getvalue()

    return trained


@pytest.fixture
def stopped(run, monkeypatch):
    """Trains so many steps, then stops: by a signal, or as if the process were killed."""

    def trained(steps, how, name, *words):
        looks = iter(range(1, 1000))  # training looks for a signal once after each step

        def asked():
            if next(looks) < steps:
                return None
            if how == "killed":
                raise Halted
            return signal.SIGTERM

        monkeypatch.setattr(signals, "asked", asked)
        with pytest.raises((signals.Stopped, Halted)):
            run(name, *words)
        monkeypatch.undo()

    return trained


@pytest.mark.parametrize(
    ("words", "how"),
    [
        pytest.param(["algo=maml", "train.schedule=cosine"], "killed", marks=pytest.mark.slow),
        pytest.param(["algo=reptile"], "signal", marks=pytest.mark.slow),
        pytest.param(["algo=baseline"], "killed", marks=pytest.mark.slow),
        pytest.param(["algo=protonet"], "killed", marks=pytest.mark.slow),
        (["algo=protonet", "train.patience=2", "train.schedule=cosine"], "signal"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_stopped_run_ends_as_one_that_never_was(words, how, run, stopped, tmp_path):
    run("whole", *words)
    for steps in (3, 3, 2):
        stopped(steps, how, "stopped", *words, "resume=auto")
    assert "going on from step" in run("stopped", *words, "resume=auto")
    assert difference(left(tmp_path / "stopped"), left(tmp_path / "whole")) is None


@pytest.mark.slow
def test_a_finished_run_is_shown_again(run, tmp_path):
    first = run("x", "algo=protonet", "resume=auto")
    times = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    again = run("x", "algo=protonet", "resume=auto")
    assert (
        "finished" in again
        and "accuracy" in first
        and again.splitlines()[-3:] == first.splitlines()[-3:]
    )
    assert times == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*") if path.is_file()
    }
    with pytest.raises(UserError, match=r"finished run; resume=auto"):
        run("x", "algo=protonet")


@pytest.mark.slow
def test_another_configuration_is_named(run, stopped, tmp_path):
    stopped(4, "killed", "x", "algo=protonet")
    with pytest.raises(UserError, match=r"train\.lr=0\.001, not 0\.5"):
        run("x", "algo=protonet", "train.lr=0.5", "resume=auto")
    with pytest.raises(UserError, match=r"algo\._target_=.*ProtoNet, not .*MAML"):
        run("x", "algo=maml", "resume=auto")
    with pytest.raises(UserError, match=r"stopped run; resume=auto"):
        run("x", "algo=protonet")
    run(
        "x", "algo=protonet", "resume=auto", "checkpoint.every=3", "logger=none"
    )  # changes nothing of the result


def flipped(content):
    """One bit of one weight is another."""
    weight = (
        torch.load(io.BytesIO(content), weights_only=True)["meta"]["net.conv0.weight"]
        .numpy()
        .tobytes()
    )
    place = content.index(weight)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.slow
def test_a_torn_checkpoint_is_refused_and_the_one_before_it_used(run, stopped, tmp_path):
    run("whole", "algo=protonet")
    for name, change in {
        "torn": lambda content: content[: len(content) // 2],
        "flipped": flipped,
        "foreign": lambda content: b"not a checkpoint",
    }.items():
        stopped(8, "killed", name, "algo=protonet")
        file = tmp_path / name / "checkpoints/last.pt"
        file.write_bytes(change(file.read_bytes()))
        said = run(name, "algo=protonet", "resume=auto")
        assert (
            "last.pt" in said
            and "going back to the one before" in said
            and "going on from step 6" in said
        )
        assert difference(left(tmp_path / name), left(tmp_path / "whole")) is None
    stopped(8, "killed", "none", "algo=protonet")
    for file in (tmp_path / "none/checkpoints").iterdir():
        file.write_bytes(b"")
    for _ in range(2):  # never silently from the beginning
        with pytest.raises(UserError, match="no checkpoint there is whole"):
            run("none", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_resume_from_the_folder_alone(run, stopped, tmp_path):
    stopped(5, "killed", "x", "algo=protonet")
    verb.resume(tmp_path / "x", Console(file=io.StringIO()))
    run("whole", "algo=protonet")
    assert difference(left(tmp_path / "x"), left(tmp_path / "whole")) is None
    with pytest.raises(UserError, match="no run"):
        verb.resume(tmp_path / "absent", Console(file=io.StringIO()))


@pytest.mark.slow
def test_a_folder_has_one_process_at_a_time_and_a_killed_one_leaves_no_lock(run, stopped, tmp_path):
    stopped(5, "killed", "x", "algo=protonet")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"import time, pathlib; from metalearn.lock import alone_in\nwith alone_in(pathlib.Path({str(tmp_path / 'x')!r})):\n print('held', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another process"):
        run("x", "algo=protonet", "resume=auto")
    holder.kill()
    holder.wait()
    run("x", "algo=protonet", "resume=auto")
    with lock.alone_in(tmp_path / "x"):
        pass


@pytest.mark.slow
def test_a_multirun_skips_what_is_finished_and_goes_on_with_the_rest(metalearn, tmp_path):
    words = ["train", "-m", "algo=protonet", *SMALL, "seed=0,1,2", "hydra.sweep.dir=sweep"]
    assert metalearn(*words).returncode == 0
    before = (tmp_path / "sweep/0/result.json").read_text()
    (tmp_path / "sweep/1/result.json").unlink()  # as if it had been killed while it was tested
    again = metalearn(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished") == 2 and "going on from step 2" in again.stdout
    assert (tmp_path / "sweep/0/result.json").read_text() == before
    assert (tmp_path / "sweep/1/result.json").exists()


def test_a_step_that_is_not_finite_is_named_kept_and_perhaps_skipped(run, tmp_path, monkeypatch):
    from metalearn.algorithms.protonet import ProtoNet

    original = ProtoNet.embedding_loss

    def sick_at_step(number):
        seen = iter(range(1000))

        def judged(self, *arguments):
            loss = original(self, *arguments)
            if next(seen) == 2 * (number - 1) + 1:  # the second task of the step
                nan = loss.value * torch.nan
                loss = loss._replace(value=nan, logs=loss.logs | {"loss": nan.detach()})
            return loss

        monkeypatch.setattr(ProtoNet, "embedding_loss", judged)

    words = ["algo=protonet", "engine.strategy=loop"]
    sick_at_step(5)
    with pytest.raises(
        RunFailed, match=r"step 5, task 1 of 2, kept in .*step5-task1\.pt.*train\.nonfinite=skip"
    ):
        run("stop", *words)
    kept = torch.load(tmp_path / "stop/nonfinite/step5-task1.pt", weights_only=True)
    assert kept["query"]["x"].shape[1:] == (1, 16, 16)
    assert checkpoint.load(tmp_path / "stop/checkpoints/last.pt", torch.device("cpu"))["step"] == 4

    sick_at_step(5)
    said = run("skip", *words, "train.nonfinite=skip")
    assert "not finite at step 5, task 1" in said and "skipped" in said
    rows = [json.loads(line) for line in (tmp_path / "skip/metrics.jsonl").read_text().splitlines()]
    assert {row["step"]: row.get("train.skipped") for row in rows} == {
        3: None,
        4: None,
        6: 1,
        8: None,
        9: None,
    }
    last = checkpoint.load(tmp_path / "skip/checkpoints/last.pt", torch.device("cpu"))
    assert all(
        value.isfinite().all() for part in ("meta", "fixed") for value in last[part].values()
    )


class FlakyWandb:
    """W&B whose service dies in the middle of a run."""

    def __init__(self, dies):
        self.rows, self.dies, self.summary, self.url = [], dies, {}, ""

    def log(self, row, step=None):
        if self.dies and len(self.rows) == 1:
            raise BrokenPipeError("the service has died")
        self.rows.append(row)

    def finish(self, exit_code):
        if self.dies:
            raise BrokenPipeError("the service has died")


@pytest.mark.slow
def test_wandb_that_fails_in_the_middle_goes_on_offline(run, tmp_path, monkeypatch):
    runs = []

    def init(mode, **settings):
        runs.append((mode, FlakyWandb(dies=mode == "online")))
        return runs[-1][1]

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    said = run("x", "algo=protonet", "logger=wandb")
    assert "W&B: failed (the service has died); going on offline" in said
    assert [mode for mode, _ in runs] == ["online", "offline"]
    assert (
        sum(len(one.rows) for _, one in runs) == 5 + 1
    )  # rows at steps 3, 4, 6, 8, 9, and the result
    assert (tmp_path / "x/result.json").exists()


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_in_a_line_and_loses_nothing(run, tmp_path, monkeypatch):
    original = checkpoint.save
    saved = []

    def full(path, content, previous=None):
        saved.append(path.name)
        if saved.count("last.pt") == 3:
            raise OSError(28, "No space left on device", str(path))
        original(path, content, previous)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunFailed, match=r"last\.pt: No space left on device; .*metalearn resume"):
        run("x", "algo=protonet")
    monkeypatch.setattr(checkpoint, "save", original)
    assert "going on from step 4" in run("x", "algo=protonet", "resume=auto")
    run("whole", "algo=protonet")
    assert difference(left(tmp_path / "x"), left(tmp_path / "whole")) is None


@pytest.mark.slow
def test_a_profiled_run_goes_on(run, stopped):
    stopped(7, "signal", "x", "algo=protonet", "engine.profile=true")
    run("x", "algo=protonet", "engine.profile=true", "resume=auto")


@pytest.mark.slow
def test_a_run_goes_on_where_it_began_alone(run, stopped, tmp_path):
    stopped(5, "killed", "x", "algo=protonet")
    engine = tmp_path / "x/engine.json"
    engine.write_text(engine.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(UserError, match="processes=4, here it is 1"):
        run("x", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_other_data_are_noticed(run, stopped, monkeypatch):
    stopped(5, "killed", "x", "algo=protonet")
    monkeypatch.setattr("metalearn.data.images.Pictures.content_hash", lambda pictures: "other")
    with pytest.raises(UserError, match="data, or their split, are others"):
        run("x", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_a_signal_while_the_initialisation_is_validated_stops_the_run(stopped, tmp_path):
    stopped(1, "signal", "x", "algo=protonet", "train.steps=0")
    assert not (tmp_path / "x/result.json").exists()


def test_other_classes_in_the_splits_are_other_data(make_run):
    run = make_run("algo=protonet")
    kept = Training(run).kept()
    Training(run).restore(kept)
    swapped = run.class_names | {"train": run.class_names["test"], "test": run.class_names["train"]}
    with pytest.raises(UserError, match="their split"):
        Training(dataclasses.replace(run, class_names=swapped)).restore(kept)


def test_a_meter_that_goes_on_does_not_count_tasks_of_before():
    meter, again = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    meter.restart_clock()
    meter.count(100)
    again.restore(meter.kept())
    again.restart_clock()
    assert again.steps == 1 and again.read()["tasks_per_second"] == 0


def test_the_row_of_an_untrained_run_stays(run, tmp_path):
    run("x", "algo=protonet", "train.steps=0")
    rows = (tmp_path / "x/metrics.jsonl").read_text()
    (tmp_path / "x/result.json").unlink()  # as if it had been killed while it was tested
    run("x", "algo=protonet", "train.steps=0", "resume=auto")
    assert (tmp_path / "x/metrics.jsonl").read_text() == rows and rows.count("\n") == 1


def test_the_command_is_that_of_the_attempt_that_began(tmp_path):
    first = verb.note_command(tmp_path, "a", ["episode.way=500"])
    second = verb.note_command(tmp_path, "a", ["episode.way=4"])
    assert second["overrides"] == ["episode.way=4"] and second["id"] == first["id"]
    (tmp_path / "config.yaml").write_text("")
    assert verb.note_command(tmp_path, "a", ["episode.way=3"])["overrides"] == ["episode.way=4"]


@pytest.mark.slow
def test_another_chunk_is_kept_for_good(run, stopped, tmp_path):
    stopped(4, "killed", "x", "algo=maml", "engine.strategy=vmap")
    stopped(
        2, "killed", "x", "algo=maml", "engine.strategy=vmap", "engine.task_chunk=1", "resume=auto"
    )
    verb.resume(tmp_path / "x", Console(file=io.StringIO()))
    assert json.loads((tmp_path / "x/engine.json").read_text())["train"]["chunk"] == 1
    assert json.loads((tmp_path / "x/result.json").read_text())["engine"]["train"]["chunk"] == 1


@pytest.mark.slow
def test_a_multirun_shows_what_is_finished_whatever_was_refused_later(metalearn, tmp_path):
    words = ["train", "-m", "algo=protonet", *SMALL, "hydra.sweep.dir=sweep"]
    assert metalearn(*words, "episode.way=4,3").returncode == 0
    more = metalearn(*words, "episode.way=5,4,3")
    assert more.returncode == 1
    assert "4w 1s" in more.stdout and "holds a run with episode.way=4, not 5" in more.stdout
    again = metalearn(*words, "episode.way=4,3")
    assert (
        again.returncode == 0 and "2: episode.way=3" in again.stdout
    )  # what is not asked for now is there all the same
    assert not (tmp_path / "sweep/0/error.txt").exists()


def test_why_a_run_failed_is_said_even_on_a_full_disk(tmp_path):
    assert launch._noted(OSError(28, "No space left on device"), tmp_path / "absent/error.txt")
    assert (
        str(launch.told(OSError(28, "No space left on device", "result.json")))
        == "result.json: No space left on device"
    )
