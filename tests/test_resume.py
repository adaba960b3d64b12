"""A resumed run equals an uninterrupted one, and nothing in its folder is lost."""

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

from metalearn.cli import _launch
from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint, resuming, train
from metalearn.run.step import Meter, Training
from metalearn.system import lock, signals
from metalearn.system.errors import RunFailed, UserError, as_failure
from tests.fixtures import SMALL

_SHORT = [
    "train.steps=9",
    "val.every=4",
    "train.log_every=3",
    "checkpoint.every=2",
    "train.meta_batch=2",
    "train.batch_size=8",
]


class Halted(BaseException):
    """Simulates a kill."""


@pytest.fixture
def run(compose, tmp_path):
    """Train in a folder and return the output."""

    def train_in(name, *overrides):
        output = io.StringIO()
        words = [*_SHORT, *overrides]
        console = Console(file=output, width=300)
        train.train(compose(*words), tmp_path / name, "a run", words, console)
        return output.getvalue()

    return train_in


@pytest.fixture
def interrupt(run, monkeypatch):
    """Train for some steps, then stop by a signal or as if the process were killed."""

    def train_and_stop(steps, how, name, *overrides):
        checks = iter(range(1, 1000))  # training checks for a signal once after each step

        def asked():
            if next(checks) < steps:
                return None
            if how == "killed":
                raise Halted
            return signal.SIGTERM

        monkeypatch.setattr(signals, "received_signal", asked)
        with pytest.raises((signals.Stopped, Halted)):
            run(name, *overrides)
        monkeypatch.undo()

    return train_and_stop


@pytest.mark.parametrize(
    ("overrides", "how"),
    [
        pytest.param(["algo=maml", "train.schedule=cosine"], "killed", marks=pytest.mark.slow),
        pytest.param(["algo=reptile"], "signal", marks=pytest.mark.slow),
        pytest.param(["algo=baseline"], "killed", marks=pytest.mark.slow),
        pytest.param(["algo=protonet"], "killed", marks=pytest.mark.slow),
        pytest.param(
            [
                *("algo=rfs", "augment=crop_flip", "+augment.mix.mixup={}", "train.ema=0.8"),
                *("train.warmup=5", "train.schedule=milestones", "train.milestones=[0.5,7]"),
                "optimiser=sgd_momentum",
            ],
            "killed",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["algo=protonet", "train.patience=2", "train.schedule=cosine"],
            "signal",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_resumed_run_equals_uninterrupted_run(overrides, how, run, interrupt, tmp_path):
    run("uninterrupted", *overrides)
    for steps in (3, 3, 2):
        interrupt(steps, how, "stopped", *overrides, "resume=auto")
    assert "resuming from step" in run("stopped", *overrides, "resume=auto")
    assert difference(left(tmp_path / "stopped"), left(tmp_path / "uninterrupted")) is None


def test_the_best_checkpoints_are_kept_also_after_kills(run, interrupt, tmp_path):
    words = ["algo=protonet", "val.every=1", "checkpoint.keep=3", "checkpoint.every=3"]
    run("uninterrupted", *words)
    for steps in (5, 4):  # killed after validations that last.pt does not know
        interrupt(steps, "killed", "stopped", *words, "resume=auto")
    run("stopped", *words, "resume=auto")
    rows = [json.loads(line) for line in (tmp_path / "stopped/metrics.jsonl").open()]
    best = sorted(rows, key=lambda row: (-row["val.accuracy"], row["step"]))[:3]
    kept = RunFolder(tmp_path / "stopped").all_kept()
    assert [file.stem for file in kept] == sorted(f"best-{row['step']}" for row in best)
    other = RunFolder(tmp_path / "uninterrupted").all_kept()
    for one, same in zip(kept, other, strict=True):
        assert one.name == same.name
        one_state, same_state = (checkpoint.load(file, torch.device("cpu")) for file in (one, same))
        assert one_state["val"] == same_state["val"]
        torch.testing.assert_close(one_state["meta"], same_state["meta"], rtol=0, atol=0)
    run("plain", "algo=protonet")
    assert RunFolder(tmp_path / "plain").all_kept() == []


@pytest.mark.slow
def test_finished_run_is_shown_again_and_left_unchanged(run, tmp_path):
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
def test_resume_with_a_different_configuration_names_the_setting(run, interrupt, tmp_path):
    interrupt(4, "killed", "x", "algo=protonet")
    with pytest.raises(UserError, match=r"train\.lr=0\.001, not 0\.5"):
        run("x", "algo=protonet", "train.lr=0.5", "resume=auto")
    with pytest.raises(UserError, match=r"algo\._target_=.*ProtoNet, not .*MAML"):
        run("x", "algo=maml", "resume=auto")
    with pytest.raises(UserError, match=r"stopped run; resume=auto"):
        run("x", "algo=protonet")
    # These settings do not affect the result.
    run("x", "algo=protonet", "resume=auto", "checkpoint.every=3", "logger=none")


def flipped(content):
    """Flip one bit of one weight."""
    weight = (
        torch.load(io.BytesIO(content), weights_only=True)["meta"]["net.conv0.weight"]
        .numpy()
        .tobytes()
    )
    position = content.index(weight)
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.slow
def test_damaged_checkpoint_is_refused_and_the_previous_one_used(run, interrupt, tmp_path):
    run("uninterrupted", "algo=protonet")
    for name, change in {
        "truncated": lambda content: content[: len(content) // 2],
        "flipped": flipped,
        "foreign": lambda content: b"not a checkpoint",
    }.items():
        interrupt(8, "killed", name, "algo=protonet")
        file = tmp_path / name / "checkpoints/last.pt"
        file.write_bytes(change(file.read_bytes()))
        output = run(name, "algo=protonet", "resume=auto")
        assert (
            "last.pt" in output
            and "using the previous checkpoint" in output
            and "resuming from step 6" in output
        )
        assert difference(left(tmp_path / name), left(tmp_path / "uninterrupted")) is None
    interrupt(8, "killed", "none", "algo=protonet")
    for file in (tmp_path / "none/checkpoints").iterdir():
        file.write_bytes(b"")
    for _ in range(2):  # training never restarts silently
        with pytest.raises(UserError, match="no checkpoint is intact"):
            run("none", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_resume_needs_only_the_folder(run, interrupt, tmp_path):
    interrupt(5, "killed", "x", "algo=protonet")
    train.resume(tmp_path / "x", Console(file=io.StringIO()))
    run("uninterrupted", "algo=protonet")
    assert difference(left(tmp_path / "x"), left(tmp_path / "uninterrupted")) is None
    with pytest.raises(UserError, match="no run"):
        train.resume(tmp_path / "absent", Console(file=io.StringIO()))


@pytest.mark.slow
def test_folder_is_locked_by_one_process_until_it_dies(run, interrupt, tmp_path):
    interrupt(5, "killed", "x", "algo=protonet")
    code = (
        "import time, pathlib; from metalearn.system.lock import alone_in\n"
        f"with alone_in(pathlib.Path({str(tmp_path / 'x')!r})):\n"
        " print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    for more in ([], ["resume=auto"]):
        with pytest.raises(UserError, match="another process is training this run"):
            run("x", "algo=protonet", *more)
    holder.kill()
    holder.wait()
    run("x", "algo=protonet", "resume=auto")
    with lock.alone_in(tmp_path / "x"):
        pass


@pytest.mark.slow
def test_multirun_skips_finished_runs_and_resumes_the_rest(metalearn, tmp_path):
    arguments = ["train", "-m", "algo=protonet", *SMALL, "seed=0,1,2", "hydra.sweep.dir=sweep"]
    assert metalearn(*arguments).returncode == 0
    before = (tmp_path / "sweep/0/result.json").read_text()
    (tmp_path / "sweep/1/result.json").unlink()  # as if killed during the test
    again = metalearn(*arguments)
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stdout.splitlines() if ": finished, test accuracy " in line]
    assert [line.partition(":")[0] for line in lines] == ["0", "2"]
    assert "resuming from step 2" in again.stdout and ".json" not in again.stdout
    assert (tmp_path / "sweep/0/result.json").read_text() == before
    assert (tmp_path / "sweep/1/result.json").exists()


def test_nonfinite_step_is_named_and_saved_and_can_be_skipped(run, tmp_path, monkeypatch):
    from metalearn.algorithms.protonet import ProtoNet

    original = ProtoNet.embedding_loss

    def nan_at_step(number):
        calls = iter(range(1000))

        def nan_loss(self, *arguments):
            loss = original(self, *arguments)
            if next(calls) == 2 * (number - 1) + 1:  # the second task of the step
                nan = loss.value * torch.nan
                loss = loss._replace(value=nan, logs=loss.logs | {"loss": nan.detach()})
            return loss

        monkeypatch.setattr(ProtoNet, "embedding_loss", nan_loss)

    overrides = ["algo=protonet", "engine.strategy=loop"]
    nan_at_step(5)
    with pytest.raises(
        RunFailed, match=r"step 5, task 1 of 2, saved in .*step5-task1\.pt.*train\.nonfinite=skip"
    ):
        run("stop", *overrides)
    episode = torch.load(tmp_path / "stop/nonfinite/step5-task1.pt", weights_only=True)
    assert episode["query"]["x"].shape[1:] == (1, 16, 16)
    assert checkpoint.load(tmp_path / "stop/checkpoints/last.pt", torch.device("cpu"))["step"] == 4

    nan_at_step(5)
    output = run("skip", *overrides, "train.nonfinite=skip")
    assert "not finite at step 5, task 1" in output and "skipped" in output
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
    """W&B with a service that dies during a run."""

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
def test_wandb_failure_during_a_run_continues_offline(run, tmp_path, monkeypatch, server):
    runs = []

    def init(mode, **settings):
        runs.append((mode, FlakyWandb(dies=mode == "online")))
        return runs[-1][1]

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", server[0])
    output = run("x", "algo=protonet", "logger=wandb")
    assert "W&B: failed (the service has died); continuing offline" in output
    assert [mode for mode, _ in runs] == ["online", "offline"]
    # Rows at steps 3, 4, 6, 8, 9, and the result.
    assert sum(len(one.rows) for _, one in runs) == 5 + 2  # the result and an episode
    assert (tmp_path / "x/result.json").exists()


@pytest.mark.slow
def test_full_disk_is_reported_in_one_line_and_loses_nothing(run, tmp_path, monkeypatch):
    original = checkpoint.save
    names = []

    def save_on_full_disk(path, content, previous=None):
        names.append(path.name)
        if names.count("last.pt") == 3:
            raise OSError(28, "No space left on device", str(path))
        original(path, content, previous)

    monkeypatch.setattr(checkpoint, "save", save_on_full_disk)
    with pytest.raises(RunFailed, match=r"last\.pt: No space left on device; .*metalearn resume"):
        run("x", "algo=protonet")
    monkeypatch.setattr(checkpoint, "save", original)
    assert "resuming from step 4" in run("x", "algo=protonet", "resume=auto")
    run("uninterrupted", "algo=protonet")
    assert difference(left(tmp_path / "x"), left(tmp_path / "uninterrupted")) is None


@pytest.mark.slow
def test_profiled_run_resumes(run, interrupt):
    interrupt(7, "signal", "x", "algo=protonet", "engine.profile=true")
    run("x", "algo=protonet", "engine.profile=true", "resume=auto")


@pytest.mark.slow
def test_resume_with_a_different_number_of_processes_is_refused(run, interrupt, tmp_path):
    interrupt(5, "killed", "x", "algo=protonet")
    engine = tmp_path / "x/engine.json"
    engine.write_text(engine.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(UserError, match="processes=4, here it is 1"):
        run("x", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_resume_with_different_data_is_refused(run, interrupt, monkeypatch):
    interrupt(5, "killed", "x", "algo=protonet")
    monkeypatch.setattr("metalearn.data.images.ClassImages.content_hash", lambda pictures: "other")
    with pytest.raises(UserError, match="data or their split have changed"):
        run("x", "algo=protonet", "resume=auto")


@pytest.mark.slow
def test_signal_during_validation_of_the_initialisation_stops_the_run(interrupt, tmp_path):
    interrupt(1, "signal", "x", "algo=protonet", "train.steps=0")
    assert not (tmp_path / "x/result.json").exists()


def test_resume_with_different_splits_is_refused(make_run):
    run = make_run("algo=protonet")
    content = Training(run).state_dict()
    Training(run).load_state_dict(content)
    swapped = run.class_names | {"train": run.class_names["test"], "test": run.class_names["train"]}
    with pytest.raises(UserError, match="their split"):
        Training(dataclasses.replace(run, class_names=swapped)).load_state_dict(content)


def test_restored_meter_does_not_count_earlier_tasks():
    meter, restored = Meter(torch.device("cpu")), Meter(torch.device("cpu"))
    meter.restart_clock()
    meter.count(100)
    restored.load_state_dict(meter.state_dict())
    restored.restart_clock()
    assert restored.steps == 1 and restored.read()["tasks_per_second"] == 0


@pytest.mark.slow
def test_resumed_untrained_run_does_not_repeat_its_row(run, tmp_path):
    run("x", "algo=protonet", "train.steps=0")
    rows = (tmp_path / "x/metrics.jsonl").read_text()
    (tmp_path / "x/result.json").unlink()  # as if killed during the test
    run("x", "algo=protonet", "train.steps=0", "resume=auto")
    assert (tmp_path / "x/metrics.jsonl").read_text() == rows and rows.count("\n") == 1


def test_saved_command_is_that_of_the_attempt_that_started(tmp_path):
    first = resuming.save_command(RunFolder(tmp_path), "a", ["episode.way=500"])
    second = resuming.save_command(RunFolder(tmp_path), "a", ["episode.way=4"])
    assert second["overrides"] == ["episode.way=4"] and second["id"] == first["id"]
    (tmp_path / "config.yaml").write_text("")
    assert resuming.save_command(RunFolder(tmp_path), "a", ["episode.way=3"])["overrides"] == [
        "episode.way=4"
    ]


@pytest.mark.slow
def test_changed_chunk_persists_after_resume(run, interrupt, tmp_path):
    interrupt(4, "killed", "x", "algo=maml", "engine.strategy=vmap")
    interrupt(
        2, "killed", "x", "algo=maml", "engine.strategy=vmap", "engine.task_chunk=1", "resume=auto"
    )
    train.resume(tmp_path / "x", Console(file=io.StringIO()))
    assert json.loads((tmp_path / "x/engine.json").read_text())["train"]["chunk"] == 1
    assert json.loads((tmp_path / "x/result.json").read_text())["engine"]["train"]["chunk"] == 1
    assert "task_chunk: 1\n" in (tmp_path / "x/config.yaml").read_text()


@pytest.mark.slow
def test_multirun_shows_finished_runs_even_if_another_is_refused(metalearn, tmp_path):
    arguments = ["train", "-m", "algo=protonet", *SMALL, "hydra.sweep.dir=sweep"]
    assert metalearn(*arguments, "episode.way=4,3").returncode == 0
    more = metalearn(*arguments, "episode.way=5,4,3")
    assert more.returncode == 1
    assert "4w 1s" in more.stdout and "holds a run with episode.way=4, not 5" in more.stdout
    again = metalearn(*arguments, "episode.way=4,3")
    # The table also shows runs that this command did not request.
    assert again.returncode == 0 and "2: episode.way=3" in again.stdout
    assert not (tmp_path / "sweep/0/error.txt").exists()


def test_failure_is_reported_even_on_a_full_disk(tmp_path):
    assert _launch._save_error(
        OSError(28, "No space left on device"), RunFolder(tmp_path / "absent")
    )
    assert (
        str(as_failure(OSError(28, "No space left on device", "result.json")))
        == "result.json: No space left on device"
    )
