"""Run random command lines, read random run folders, and write docs/reliability.md.

python scripts/bench_fuzz.py [lines=10000] [processes=300] [folders=1000] [seed=0]

Each line must end in a run or in a one-line error. `lines` of them are parsed, composed and
validated in this process; `processes` others are run, each in its own process. A traceback, an exit
code other than 0, 1 or 2, an error of several lines, or a timeout is a failure. `folders` run
folders are mutated and given to compare, evaluate, resume and load; see fuzz_folders.py.
"""

import contextlib
import io
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz_folders import Folders, OutOfTime, time_limit
from omegaconf import DictConfig
from pages import ROOT, fill, wrap

from metalearn.cli import _arguments, _launch
from metalearn.config import checking, choices, composition
from metalearn.report.environment import describe_environment
from metalearn.system.errors import RunFailed, UserError

#: Appended to lines that are run, so that valid ones end soon.
_SMALL = (
    "dataset.num_classes=60", "dataset.image_size=16", "train.steps=2", "val.episodes=4",
    "test.episodes=4", "logger=none", "hydra.run.dir=run", "hydra.sweep.dir=sweep",
)  # fmt: skip
_LINE_SECONDS, _PROCESS_SECONDS = 20, 240
_HOSTILE = (
    "", " ", "null", "None", "true", "-1", "0", "-0", "1e400", "-1e400", "nan", "inf", "9" * 40,
    "0.0000001", "1_000", "0x10", "[]", "[1,2", "[1,[2,3]]", "{}", "{a:1}", "{a", "(", ")", "'",
    '"', "'unfinished", "\\", "\\n", "a\nb", "\t", "%", "$", "${", "${}", "${seed}",
    "${train.steps}", "${nothing}", "${oc.env:HOME}", "${oc.env:NOTHING_OF_THIS_NAME}",
    "${oc.decode:x}", "${algo}", "???", "!!python/object:os.system", "ünïcödé", "数据集", "😀",
    "\u202e\u200b", "é" * 300, "a" * 5000, "../../etc/passwd", "/dev/null", "/", "~", "*", "?",
    "a=b", "a=b=c", "1,2", "1,2,", ",", "range(3)", "range(1,2", "choice(1,2)", "glob(*)",
    "interval(0,1)", "tag(x)", "sort(3,1)", "int(3.5)", "float(x)", "metalearn.cli.main",
    "os.system", "builtins.exec", "@", "#", "; rm -rf x", "`id`", "--help", "-", "--",
)  # fmt: skip
_ODD_ARGUMENTS = (
    "", "-", "--", "---", "-x", "--nothing", "--cfg", "--cfg=job", "--info", "--multirun=", "-m",
    "--resolve", "--package", "--run", "--config-dir", "--config-dir=/nowhere", "-cd", "=", "=1",
    "==", "a", "a.b", ".", "..", "a..b=1", ".a=1", "a.=1", "+a=1", "++a=1", "~algo", "~seed",
    "~train.lr", "+algo=maml", "algo@x=maml", "algo/x=1", "hydra.mode=MULTIRUN",
    "hydra/launcher=nothing", "hydra/sweeper=nothing", "train=1", "algo={}", "train={steps: 3}",
    "train.steps.x=1", "dataset.path=/", "backbone.hidden=[1,a]", "experiment=demo",
    "experiment=nothing", "algo._target_=os.system", "algo._target_=metalearn.cli.main",
    "dataset._target_=metalearn.build.Run", "backbone._target_=null", "$(id)", "é=é", "\U0001f600",
    "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
)  # fmt: skip


class Lines:
    """Draw command lines: mostly existing keys and values, sometimes anything."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        composed = composition.compose_config([])
        self._keys = list(checking.leaves(composed))
        self._defaults = {key: str(_select(composed, key)) for key in self._keys}
        self._groups = {
            group: list(choices.options(group)) for group in choices.groups() if group != "recipe"
        }

    def line(self, all_commands: bool) -> list[str]:
        """Draw the arguments after `metalearn`: of `train`, or of any command."""
        draw = self._draw
        if all_commands and draw.random() < 0.25:
            return [draw.choice(_COMMANDS), *(self._argument() for _ in range(draw.randint(0, 3)))]
        # Mostly embedded data, so that valid lines run anywhere.
        args = (
            ["train"]
            if draw.random() < 0.1
            else ["train", f"algo={draw.choice(self._groups['algo'])}", "dataset=glyphs"]
        )
        if draw.random() < 0.1:
            args.append(draw.choice(("-m", "--multirun")))
        return [*args, *(self._argument() for _ in range(draw.randint(0, 4)))]

    def _argument(self) -> str:
        draw, kind = self._draw, self._draw.random()
        if kind < 0.1:
            return draw.choice(_ODD_ARGUMENTS)
        if kind < 0.25:
            group = draw.choice(list(self._groups))
            return f"{group}={draw.choice(self._groups[group])}"
        key = draw.choice(self._keys)
        if kind < 0.35:
            at = draw.randrange(len(key))
            key = key[:at] + draw.choice(("", "x", ".", "é", key[at] * 2)) + key[at + 1 :]
        if kind < 0.4:
            key = draw.choice(("+", "++", "~")) + key
        value = self._defaults.get(key, "1") if draw.random() < 0.4 else draw.choice(_HOSTILE)
        if draw.random() < 0.15:
            value = str(
                draw.choice((draw.randint(-3, 3), draw.uniform(-1, 1), 10 ** draw.randint(0, 30)))
            )
        return f"{key}={value}"


_COMMANDS = (
    "evaluate",
    "compare",
    "reproduce",
    "resume",
    "list",
    "doctor",
    "trian",
    "",
    "help",
    "--version",
    "-h",
    "-sc",
)


def _select(composed: DictConfig, key: str) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.select(composed, key)


def check_line(args: list[str]) -> str | None:
    """Parse, compose and validate a line in this process; return the failure, or None."""
    try:
        with time_limit(_LINE_SECONDS):
            _launch.check(_arguments.parse(args[1:]))
    except (UserError, RunFailed) as error:
        return "its error has several lines" if "\n" in str(error) else None
    except OutOfTime:
        return f"timeout after {_LINE_SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def run_line(args: list[str], folder: Path, cache: Path) -> str | None:
    """Run a line in its own process; return the failure, or None."""
    if args[0] == "train":
        args = [*args, *_SMALL]
    environment = {
        **os.environ,
        "METALEARN_CACHE": str(cache),
        "METALEARN_DATA": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "metalearn", *args]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROCESS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"timeout after {_PROCESS_SECONDS} s"
    if "Traceback" in done.stderr + done.stdout:
        return "a traceback"
    if done.returncode not in (0, 1, 2):
        return f"exit code {done.returncode}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("metalearn: ")]
    if done.returncode == 2 and not done.stdout and len(errors) != 1:
        return f"exit code 2 with {len(errors)} error lines"
    return None


def main() -> None:
    """Check random lines and folders, write the outcome, and exit with 1 if any failed."""
    options = dict(arg.partition("=")[::2] for arg in sys.argv[1:])
    defaults = {"lines": 10000, "processes": 300, "folders": 1000, "seed": 0}
    lines, processes, folders, seed = (int(options.get(name, defaults[name])) for name in defaults)
    failures = check_folders(folders, seed) if folders else []
    if lines or processes:
        failures += check_lines(lines, processes, seed)
    sys.exit(bool(failures))


def _report(section: str, what: str, failures: list[str], options: str) -> None:
    """Write the outcome of a part to docs/reliability.md."""
    hangs = [line for line in failures if re.search(r"timeout after \d+ s$", line)]
    text = [
        f"{what}: {len(failures) - len(hangs)} tracebacks or unclear errors, {len(hangs)} hangs.",
        f"`python scripts/bench_fuzz.py {options}`, "
        f"commit {describe_environment('cpu')['commit']}.",
    ]
    fill(ROOT / "docs/reliability.md", f"{section}: written by scripts/bench_fuzz.py", wrap(text))
    print("\n".join(text))


def check_folders(count: int, seed: int) -> list[str]:
    """Read mutated run folders, and write the outcome. Return the failures."""
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        made = Folders(Path(name), seed)
        for number in range(count):
            for failure in made.check(number):
                failures.append(failure)
                print(f"FAILED {failure}", flush=True)
            if number % 100 == 99:
                print(f"{number + 1} folders, {len(failures)} failures", flush=True)
        os.chdir(ROOT)
    effects = ("something was written outside", "an escape sequence reached the terminal")
    outside = [failure for failure in failures if failure.endswith(effects)]
    what = (
        f"{count} run folders, each with one to three random changes (bytes, types, sizes, pipes, "
        "devices, links, YAML bombs, escape sequences, interpolations, missing files), given to "
        f"compare, evaluate, resume and load, {made.usual} times without an effect and "
        f"{made.refused} times refused with one line: {len(outside)} times something was written "
        f"outside or an escape sequence printed"
    )
    _report("folders", what, failures, f"lines=0 processes=0 folders={count} seed={seed}")
    return failures


def check_lines(count: int, processes: int, seed: int) -> list[str]:
    """Check and run random lines, and write the outcome. Return the failures."""
    failures: list[str] = []
    valid = 0
    lines = Lines(seed)
    for number in range(count):
        args = lines.line(all_commands=False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            failure = check_line(args)
        if failure:
            failures.append(f"{args}: {failure}")
            print(f"FAILED {failures[-1]}", flush=True)
        if number % 1000 == 999:
            print(f"{number + 1} lines, {len(failures)} failures", flush=True)
    lines = Lines(seed + 1)
    with tempfile.TemporaryDirectory() as name:
        for number in range(processes):
            folder = Path(name) / str(number)
            folder.mkdir()
            args = [arg.replace("\0", "") for arg in lines.line(all_commands=True)]
            failure = run_line(args, folder, Path(name) / "cache")
            valid += any(folder.rglob("result.json"))
            if failure:
                failures.append(f"{args}: {failure}")
                print(f"FAILED {failures[-1]}", flush=True)
            if number % 50 == 49:
                print(
                    f"{number + 1} processes, {valid} finished runs, {len(failures)} failures",
                    flush=True,
                )
    what = (
        f"{count} random lines, composed and validated in one process, and {processes} others, "
        f"each in its own process, of which {valid} ended in a finished run"
    )
    _report("lines", what, failures, f"lines={count} processes={processes} folders=0 seed={seed}")
    return failures


if __name__ == "__main__":
    main()
