"""Mutate run folders, and give each to compare, evaluate, resume and load: a part of bench_fuzz.py.

Each must end in its usual output or in a one-line error, in time, without an escape sequence on the
terminal and without a change outside of the run folder.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import yaml

import metalearn
from metalearn.cli import compare, evaluate, train
from metalearn.report.console import open_console
from metalearn.run import checkpoint
from metalearn.run.train import resume
from metalearn.system.errors import as_failure, exit_code

_SECONDS = 60
_RUN = (
    "algo=protonet", "dataset=glyphs", "dataset.num_classes=60", "dataset.image_size=8",
    "backbone.filters=4", "backbone.blocks=2", "episode.query=2", "train.steps=4",
    "train.meta_batch=1", "train.log_every=1", "val.every=2", "val.episodes=3", "test.episodes=4",
    "checkpoint.every=2", "engine.threads=1", "device=cpu", "logger=none",
)  # fmt: skip
_ESCAPE = "\x1b[31mred\x1b]0;title\x07\n\u202e"
_VALUES: tuple[Any, ...] = (
    None, {}, [], "", "x", "...", True, -1, 0, 10**30, -(10**30), 1e308, 10**300, "9" * 100,
    _ESCAPE, "${oc.env:HOME}", "${seed}", "${", "???", "../../precious", "/dev/zero", "\udcff",
    ["x"], [[]], {"x": 1}, {"_target_": "os.system"}, "$\\frac{$", "a/b", "!!python/name:os.system",
)  # fmt: skip
_TEXTS = (
    b"", b"null", b"[]", b"[1]", b"{}", b"\xff\xfe", b"0", b"\x00" * 100, b"nan", b"[NaN]",
    b"[" * 100_000, b'{"a":' * 5000, b"- " * 50_000, b"9" * 100_000, b"a: !!int " + b"1:" * 50_000,
    b"a: !!python/object/apply:os.system [id]", b"a: &a [*a]", b"step: 1\n" * 10_000,
    "\n".join(
        ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
        + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    ).encode(),
    "\n".join(
        ["a0: &a0 {x: 1}"]
        + [f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 10)]
    ).encode(),
)  # fmt: skip


class OutOfTime(BaseException):
    """Raised when something does not end in time."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise OutOfTime in the block after some seconds."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise OutOfTime(f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


class Folders:
    """Run folders in a temporary folder, mutated at random.

    Args:
        work: The temporary folder; `precious/` in it must never change.
        seed: Seed of the mutations.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self._draw = work.resolve(), random.Random(seed)
        self.precious = self.work / "precious"
        self.precious.mkdir()
        for name in ("text", "checkpoint"):
            (self.precious / name).write_text("do not touch")
        os.chdir(self.work)
        with contextlib.redirect_stdout(io.StringIO()):
            code = train.main([*_RUN, f"cache_dir={self.work}/cache", "hydra.run.dir=finished"])
            evaluate.main(["run=finished"])
        assert code == 0
        shutil.copytree("finished", "stopped")
        for file in ("result.json", "test_scores.csv", "test_classes.csv", "learning_curve.png"):
            (self.work / "stopped" / file).unlink()
        shutil.copytree("finished", "good")
        self._expected = self._outside()
        #: Number of commands that ended as usual, and that ended in a one-line error.
        self.usual = self.refused = 0

    def check(self, number: int) -> list[str]:
        """Mutate a run folder and give it to all commands. Return the failures."""
        folder = self.work / f"runs{number}" / "run"
        shutil.copytree(self.work / self._draw.choice(("finished", "stopped")), folder)
        mutations = [self._mutate(folder) for _ in range(self._draw.choice((1, 1, 1, 2, 3)))]
        good = self.work / "good"
        commands: dict[str, Callable[[], object]] = {
            "load": lambda: metalearn.load(folder, device="cpu"),
            "compare": lambda: compare.main(
                [str(folder.parent), str(good), f"out={folder.parent}"]
            ),
            "compare alone": lambda: compare.main([str(folder)]),
            "evaluate": lambda: evaluate.main([f"run={folder}"]),
            "resume": lambda: resume(folder, open_console()),
        }
        failures = []
        for name, command in commands.items():
            if failure := self._run(command):
                failures.append(f"{name}, {'; '.join(mutations)}: {failure}")
        shutil.rmtree(folder.parent)
        return failures

    def _run(self, command: Callable[[], object]) -> str | None:
        output = io.StringIO()
        try:
            with (
                time_limit(_SECONDS),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(output),
            ):
                command()
            self.usual += 1
        except OutOfTime as error:
            return f"in {error}: timeout after {_SECONDS} s"
        except Exception as error:
            error = as_failure(error)
            if exit_code(error) is None:
                return f"{type(error).__name__}: {str(error)[:200]}"
            if not str(error).isprintable():
                return "its error has several lines"
            self.refused += 1
        finally:
            os.chdir(self.work)
        if "Warning: " in output.getvalue():
            return "a warning"
        if "\x1b" in output.getvalue():
            return "an escape sequence reached the terminal"
        if self._outside() != self._expected:
            self._expected = self._outside()
            return "something was written outside"
        return None

    def _outside(self) -> list[tuple[str, float]]:
        files = [*self.precious.rglob("*"), *self.work.iterdir()]
        known = [file for file in files if not file.name.startswith("runs")]
        return sorted(
            (str(file), file.stat().st_mtime_ns if file.is_file() else 0) for file in known
        )

    def _mutate(self, folder: Path) -> str:
        """Change one thing in a run folder; return what."""
        kinds = (
            self._bytes, self._value, self._value, self._value, self._content, self._special,
            self._missing, self._tensors, self._leads_outside,
        )  # fmt: skip
        return self._draw.choice(kinds)(folder)

    def _file(self, folder: Path, *suffixes: str) -> Path:
        files = [
            path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and not path.is_symlink()
            and (not suffixes or path.suffix in suffixes)
        ]
        return self._draw.choice(files) if files else folder / "result.json"

    def _bytes(self, folder: Path) -> str:
        path, draw = self._file(folder), self._draw
        content = bytearray()
        if path.is_file():
            with path.open("rb") as stream:  # another mutation may have made it huge
                content += stream.read(1_000_000)
        at = draw.randrange(len(content) + 1)
        kind = draw.choice(("flipped", "inserted", "truncated"))
        if kind == "flipped":
            for _ in range(draw.choice((1, 10))):
                if content:
                    content[draw.randrange(len(content))] = draw.randrange(256)
        elif kind == "inserted":
            content[at:at] = draw.randbytes(draw.choice((1, 1000)))
        else:
            del content[at:]
        path.write_bytes(content)
        return f"{path.name}: bytes {kind}"

    def _value(self, folder: Path) -> str:
        """Replace, remove or add a value in a JSON, YAML or CSV file."""
        path, draw = self._file(folder, ".json", ".yaml", ".jsonl", ".csv"), self._draw
        value = draw.choice(_VALUES)
        try:
            text = path.read_text()
            if path.suffix in (".csv", ".jsonl"):
                rows = text.split("\n")
                rows[draw.randrange(len(rows))] = draw.choice((json.dumps(value), f"0,{value}"))
                path.write_text("\n".join(rows), errors="replace")
                return f"{path.name}: a row is {value!r:.50}"
            is_json = path.suffix == ".json"
            content = json.loads(text) if is_json else yaml.safe_load(text)
            node, key = self._place(content)
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = value
            written = json.dumps(content) if is_json else yaml.safe_dump(content)
            path.write_text(written)
        except Exception as error:  # of an earlier mutation
            return f"{path.name}: not changed ({type(error).__name__})"
        return f"{path.name}: {key}={value!r:.50}"

    def _place(self, content: Any) -> tuple[Any, Any]:
        """Return a container somewhere in `content`, and one of its keys."""
        draw = self._draw
        places, waiting = [], [content]
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict | list) and node:
                places.append(node)
                waiting += node.values() if isinstance(node, dict) else node
        node = draw.choice(places)
        keys = list(node) if isinstance(node, dict) else range(len(node))
        return node, draw.choice(keys)

    def _content(self, folder: Path) -> str:
        path, text = self._file(folder), self._draw.choice(_TEXTS)
        path.write_bytes(text)
        return f"{path.name}: content {text[:20]!r}"

    def _special(self, folder: Path) -> str:
        """Replace a file by something that is none."""
        path, draw = self._file(folder), self._draw
        path.unlink(missing_ok=True)
        kind = draw.choice(("fifo", "zero", "folder", "dangling", "loop", "huge", "kernel"))
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            with path.open("wb") as stream:
                stream.truncate(1 << 40)
        else:
            target = {"zero": "/dev/zero", "kernel": "/proc/kmsg", "loop": path.name}
            path.symlink_to(target.get(kind, "/nowhere/at/all"))
        return f"{path.name}: {kind}"

    def _missing(self, folder: Path) -> str:
        path = self._file(folder)
        path.unlink(missing_ok=True)
        return f"{path.name}: missing"

    def _tensors(self, folder: Path) -> str:
        """Change a value of a checkpoint, and correct its checksum."""
        path, draw = self._file(folder, ".pt"), self._draw
        try:
            content = torch.load(path, weights_only=True)
            del content["checksum"]
            node, key = self._place(content)
            tensors = (torch.zeros(()), torch.ones(3, 3), torch.zeros(1).expand(1 << 40))
            node[key] = draw.choice((*_VALUES, *tensors))
            content["checksum"] = checkpoint._checksum(content) if draw.random() < 0.8 else "x"
            torch.save(content, path)
        except Exception as error:  # of an earlier mutation
            return f"{path.name}: not changed ({type(error).__name__})"
        return f"{path.name}: {key}={str(node[key])[:50]}"

    def _leads_outside(self, folder: Path) -> str:
        """Put a link to something precious where a command writes."""
        names = (
            "comparison.md", "comparison.csv", "comparison.png", "evaluations", "checkpoints",
            "nonfinite", "wandb", "profile", ".lock", "metrics.jsonl", "result.json", "engine.json",
            "test_scores.csv", "test_classes.csv", "learning_curve.png", "config.yaml",
            "command.json", ".writable", f".result.json.{os.getpid()}.part",
            f".best.pt.{os.getpid()}.part", f"evaluations/{_ESCAPE.replace('/', '')}.json",
        )  # fmt: skip
        path = folder / self._draw.choice(names)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        is_folder = "." not in path.name
        if path.parent.is_dir():
            path.symlink_to(self.precious if is_folder else self.precious / "text")
        return f"{path.name}: link outside"
