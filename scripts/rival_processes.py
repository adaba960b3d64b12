"""Start the rivals of `speed_rivals.py` in processes and environments of their own."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pages import ROOT
from speed_rivals import PACKAGES, PLAIN

#: Seconds that a rival may take for one answer.
_PATIENCE = 300.0


class Rival:
    """A rival's process, which is stopped while it has nothing to do.

    It has torch's defaults for threads, not those that `metalearn` sets, or one thread if its name
    says so.
    """

    def __init__(self, library: str, case: Path) -> None:
        environment = {
            key: value
            for key, value in os.environ.items()
            if key != "OMP_WAIT_POLICY" and (key != "PYTHONPATH" or library in PLAIN)
        }
        if library == PLAIN[1]:
            environment["OMP_NUM_THREADS"] = "1"
        self.library = library
        self._process = subprocess.Popen(
            [_python(library), str(ROOT / "scripts/speed_rivals.py"), library, str(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=case.parent,
            env=environment,
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to a command; raise RuntimeError if there is none."""
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        self._process.send_signal(signal.SIGCONT)
        stdin.write(command + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], _PATIENCE)[0]:
            self.close()
            raise RuntimeError(f"no answer in {_PATIENCE:.0f} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError((stderr.read().strip().splitlines() or ["ended"])[-1])
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def sample(self, seconds: float) -> dict[str, float]:
        """Let it take steps for some seconds; return tasks, wall and CPU seconds."""
        return self.ask(f"sample {seconds}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _python(library: str) -> str:
    """Return the interpreter of a library's environment; make the environment if it is missing."""
    if library in PLAIN:
        return sys.executable
    folder = ROOT / "outputs" / "rivals" / re.sub(r"\W+", "-", PACKAGES[library][0])
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if uv is None:
            raise RuntimeError("requires uv: make setup")
        print(f"installing {PACKAGES[library][0]} in {folder.relative_to(ROOT)}", flush=True)
        version = ".".join(map(str, sys.version_info[:2]))
        subprocess.run([uv, "venv", "-q", "--clear", "--python", version, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(python)]
        subprocess.run([*install, *PACKAGES[library]], check=True)
        (folder / ".ready").touch()
    return str(python)


def start_rivals(run: Any, tasks: Any, overrides: list[str], folder: Path) -> Iterator[Rival]:
    """Start the plain loop, and the libraries if they can compute the case.

    These have MAML, first-order MAML and ANIL with strides, on a CPU.

    Args:
        run: The run of the case, and its tasks.
        tasks: Of one step.
        overrides: The settings of the run.
        folder: Where CASE.npz is written.
    """
    arrays = {f"param:{name}": leaf.detach().cpu() for name, leaf in run.state.params.items()}
    for name, part in (("support", tasks.support), ("query", tasks.query)):
        arrays |= {f"{name}_x": part.x.cpu(), f"{name}_y": part.y.cpu()}
    settings = run.config.algo | {
        "eps": run.config.backbone["eps"],
        "overrides": overrides,
        "device": run.device.type,
    }
    case: Any = {name: value.numpy() for name, value in arrays.items()}
    np.savez(folder / "case.npz", settings=np.array(json.dumps(settings)), **case)
    strides = run.config.backbone["downsample"] == "stride"
    for library in (*PLAIN, *(PACKAGES if strides and run.device.type == "cpu" else ())):
        try:
            yield Rival(library, folder / "case.npz")
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"  without {library}: {error}", flush=True)
