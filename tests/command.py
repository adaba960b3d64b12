"""Run the metalearn command in a separate process.

Processes fork from a server that has imported the libraries, so that starting is fast.
"""

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
    arguments: list[str],
    cwd: str,
    environment: dict[str, str],
    output: str,
    memory: int | None,
    path: str | None,
) -> None:
    """Run `metalearn` with these arguments in this process."""
    import torch

    from metalearn.cli.main import main
    from metalearn.engine import process

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    process.ALL_THREADS = int(environment["OMP_NUM_THREADS"])
    torch.set_num_threads(process.ALL_THREADS)
    if path is not None:
        sys.path.insert(0, path)
    sys.argv = ["metalearn", *arguments]
    main()


@dataclasses.dataclass
class Command:
    """A running or finished command. output: path of its output files without the suffix."""

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

    def _read(self, suffix: str) -> str:
        path = self.output.with_suffix(suffix)
        return path.read_text() if path.exists() else ""  # it may not have started yet

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 180) -> "Command":
        """Wait until the command ends."""
        self.process.join(timeout)
        assert not self.is_running, (
            f"still running after {timeout} s:\n{self.stdout}\n{self.stderr}"
        )
        return self

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition that the command causes is true."""
        while not condition():
            assert self.is_running, self.stdout + self.stderr
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


_number = 0


def start(
    arguments: tuple[str, ...],
    cwd: Path,
    output: Path,
    environment: dict[str, str | None],
    memory: int | None = None,
    path: str | None = None,
) -> Command:
    """Start `metalearn`.

    Args:
        arguments: Command-line arguments.
        cwd: Working directory.
        output: Folder for the output files.
        environment: Changes to the environment; None removes a variable.
        memory: Limit on the address space, in bytes.
        path: Additional folder of importable packages.
    """
    global _number
    _number += 1
    defaults = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "WANDB_MODE": "offline"}
    variables = {**os.environ, **defaults, **environment}
    output_path = output / f"command{_number}"
    present = {name: value for name, value in variables.items() if value is not None}
    process = CONTEXT.Process(
        target=_run, args=(list(arguments), str(cwd), present, str(output_path), memory, path)
    )
    process.start()
    return Command(process, output_path)  # type: ignore[arg-type]


def ranks(size: int) -> list[dict[str, str | None]]:
    """Return the environment variables that torchrun sets for each process of one machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
