"""The metalearn command in a process of its own, forked from a server that has the libraries loaded: a start takes no seconds."""

import dataclasses
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def _run(
    words: list[str],
    cwd: str,
    environment: dict[str, str],
    output: str,
    memory: int | None,
    path: str | None,
) -> None:
    """Become the command: `metalearn` with these words."""
    import torch

    from metalearn.cli import main
    from metalearn.engine import process

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    process._ALL_THREADS = int(environment["OMP_NUM_THREADS"])
    torch.set_num_threads(process._ALL_THREADS)
    if path is not None:
        sys.path.insert(0, path)
    sys.argv = ["metalearn", *words]
    main.main()


@dataclasses.dataclass
class Command:
    """A command that was started. output: path of its output files, without their endings."""

    process: multiprocessing.Process
    output: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    @property
    def stdout(self) -> str:
        return self._read(".out")

    @property
    def stderr(self) -> str:
        return self._read(".err")

    def _read(self, ending: str) -> str:
        path = self.output.with_suffix(ending)
        return path.read_text() if path.exists() else ""  # it may not have begun yet

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 180) -> "Command":
        """Wait for the end."""
        self.process.join(timeout)
        assert not self.is_running, f"no end in {timeout} s:\n{self.stdout}\n{self.stderr}"
        return self

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the command does."""
        while not condition():
            assert self.is_running, self.stdout + self.stderr
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


_number = 0


def start(
    words: tuple[str, ...],
    cwd: Path,
    output: Path,
    environment: dict[str, str | None],
    memory: int | None = None,
    path: str | None = None,
) -> Command:
    """Start `metalearn` with these words.

    Args:
        words: its arguments.
        cwd: its working directory.
        output: folder for what it prints.
        environment: changes to the environment; None removes a variable.
        memory: limit on its address space, in bytes.
        path: a folder of packages that it can import too.
    """
    global _number
    _number += 1
    usual = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_MODE": "offline"}
    variables = {**os.environ, **usual, **environment}
    place = output / f"command{_number}"
    kept = {name: value for name, value in variables.items() if value is not None}
    process = CONTEXT.Process(
        target=_run, args=(list(words), str(cwd), kept, str(place), memory, path)
    )
    process.start()
    return Command(process, place)  # type: ignore[arg-type]


def ranks(size: int) -> list[dict[str, str | None]]:
    """Return the environments by which torchrun tells processes of one machine of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
