"""Random command lines, valid, invalid and hostile, that must end in a run or in one line; the outcome goes into docs/reliability.md.

python scripts/bench_fuzz.py [lines=10000] [processes=300] [seed=0]

`lines` are parsed, composed and validated in this process; of other ones, `processes` are run for real, each in a process of
its own. A traceback, an exit code other than 0, 1 or 2, an error of several lines, or no end in time is a failure.
"""

import contextlib
import io
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from omegaconf import DictConfig
from pages import ROOT, fill

from metalearn import composition, config, launch, report
from metalearn.errors import RunFailed, UserError

#: Appended to lines that are run for real, so that those that are valid end soon.
_SMALL = (
    "dataset.num_classes=60", "dataset.image_size=16", "train.steps=2", "val.episodes=4", "test.episodes=4", "logger=none",
    "hydra.run.dir=run", "hydra.sweep.dir=sweep",
)  # fmt: skip
_LINE_SECONDS, _PROCESS_SECONDS = 20, 240
_HOSTILE = (
    "", " ", "null", "None", "true", "-1", "0", "-0", "1e400", "-1e400", "nan", "inf", "9" * 40, "0.0000001", "1_000", "0x10",
    "[]", "[1,2", "[1,[2,3]]", "{}", "{a:1}", "{a", "(", ")", "'", '"', "'unfinished", "\\", "\\n", "a\nb", "\t", "%", "$", "${", "${}",
    "${seed}", "${train.steps}", "${nothing}", "${oc.env:HOME}", "${oc.env:NOTHING_OF_THIS_NAME}", "${oc.decode:x}", "${algo}", "???", "!!python/object:os.system",
    "ünïcödé", "数据集", "😀", "\u202e\u200b", "é" * 300, "a" * 5000, "../../etc/passwd", "/dev/null", "/", "~", "*", "?", "a=b", "a=b=c",
    "1,2", "1,2,", ",", "range(3)", "range(1,2", "choice(1,2)", "glob(*)", "interval(0,1)", "tag(x)", "sort(3,1)", "int(3.5)", "float(x)",
    "metalearn.cli.main", "os.system", "builtins.exec", "@", "#", "; rm -rf x", "`id`", "--help", "-", "--",
)  # fmt: skip
_ODD_WORDS = (
    "", "-", "--", "---", "-x", "--nothing", "--cfg", "--cfg=job", "--info", "--multirun=", "-m", "--resolve", "--package", "--run", "--config-dir",
    "--config-dir=/nowhere", "-cd", "=", "=1", "==", "a", "a.b", ".", "..", "a..b=1", ".a=1", "a.=1", "+a=1", "++a=1", "~algo", "~seed", "~train.lr", "+algo=maml",
    "algo@x=maml", "algo/x=1", "hydra.mode=MULTIRUN", "hydra/launcher=nothing", "hydra/sweeper=nothing", "train=1", "algo={}", "train={steps: 3}", "train.steps.x=1",
    "dataset.path=/", "backbone.hidden=[1,a]", "experiment=demo", "experiment=nothing", "algo._target_=os.system", "algo._target_=metalearn.cli.main",
    "dataset._target_=metalearn.build.Run", "backbone._target_=null", "$(id)", "é=é", "\U0001f600", "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
)  # fmt: skip


class Lines:
    """Draws command lines: mostly keys and values that exist, now and then anything."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        composed = composition.composed([])
        self._keys = [key for key in config.leaves(composed) if not key.startswith("reproduction")]
        self._usual = {key: str(_select(composed, key)) for key in self._keys}
        self._groups = {
            group: list(composition.options(group))
            for group in composition.groups()
            if group != "recipe"
        }

    def line(self, verbs: bool) -> list[str]:
        """Words after `metalearn`. verbs: others than train too."""
        draw = self._draw
        if verbs and draw.random() < 0.25:
            return [draw.choice(_VERBS), *(self._word() for _ in range(draw.randint(0, 3)))]
        # Mostly embedded data, so that what is valid can run anywhere.
        words = (
            ["train"]
            if draw.random() < 0.1
            else ["train", f"algo={draw.choice(self._groups['algo'])}", "dataset=glyphs"]
        )
        if draw.random() < 0.1:
            words.append(draw.choice(("-m", "--multirun")))
        return [*words, *(self._word() for _ in range(draw.randint(0, 4)))]

    def _word(self) -> str:
        draw, kind = self._draw, self._draw.random()
        if kind < 0.1:
            return draw.choice(_ODD_WORDS)
        if kind < 0.25:
            group = draw.choice(list(self._groups))
            return f"{group}={draw.choice(self._groups[group])}"
        key = draw.choice(self._keys)
        if kind < 0.35:
            place = draw.randrange(len(key))
            key = key[:place] + draw.choice(("", "x", ".", "é", key[place] * 2)) + key[place + 1 :]
        if kind < 0.4:
            key = draw.choice(("+", "++", "~")) + key
        value = self._usual.get(key, "1") if draw.random() < 0.4 else draw.choice(_HOSTILE)
        if draw.random() < 0.15:
            value = str(
                draw.choice((draw.randint(-3, 3), draw.uniform(-1, 1), 10 ** draw.randint(0, 30)))
            )
        return f"{key}={value}"


_VERBS = (
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


class Late(BaseException):
    """A line that does not end in time."""


def _late(number: int, frame: FrameType | None) -> NoReturn:
    raise Late


def judged(words: list[str]) -> str | None:
    """Parses, composes and validates a line here. Returns: what is wrong with how it ended, or None."""
    signal.alarm(_LINE_SECONDS)
    try:
        launch.check(launch.parsed(words[1:]))
    except (UserError, RunFailed) as error:
        return "its error has several lines" if "\n" in str(error) else None
    except Late:
        return f"no end in {_LINE_SECONDS} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return None


def run(words: list[str], folder: Path, cache: Path) -> str | None:
    """Runs a line in a process of its own. Returns: what is wrong with how it ended, or None."""
    if words[0] == "train":
        words = [*words, *_SMALL]
    environment = {
        **os.environ,
        "METALEARN_CACHE": str(cache),
        "METALEARN_DATA": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "metalearn", *words]
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
        return f"no end in {_PROCESS_SECONDS} s"
    if "Traceback" in done.stderr + done.stdout:
        return "a traceback"
    if done.returncode not in (0, 1, 2):
        return f"exit code {done.returncode}"
    said = [line for line in done.stderr.splitlines() if line.startswith("metalearn: ")]
    if done.returncode == 2 and not done.stdout and len(said) != 1:
        return f"exit code 2 and {len(said)} lines that say why"
    return None


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    count, processes, seed = (
        int(given.get(name, usual))
        for name, usual in (("lines", 10000), ("processes", 300), ("seed", 0))
    )
    signal.signal(signal.SIGALRM, _late)
    failures: list[str] = []
    valid = 0
    lines = Lines(seed)
    for number in range(count):
        words = lines.line(verbs=False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            wrong = judged(words)
        if wrong:
            failures.append(f"{words}: {wrong}")
            print(f"FAILED {failures[-1]}", flush=True)
        if number % 1000 == 999:
            print(f"{number + 1} lines, {len(failures)} failures", flush=True)
    lines = Lines(seed + 1)
    with tempfile.TemporaryDirectory() as name:
        for number in range(processes):
            folder = Path(name) / str(number)
            folder.mkdir()
            words = [word.replace("\0", "") for word in lines.line(verbs=True)]
            wrong = run(words, folder, Path(name) / "cache")
            valid += any(folder.rglob("result.json"))
            if wrong:
                failures.append(f"{words}: {wrong}")
                print(f"FAILED {failures[-1]}", flush=True)
            if number % 50 == 49:
                print(
                    f"{number + 1} processes, {valid} ended in a run, {len(failures)} failures",
                    flush=True,
                )
    tracebacks = [line for line in failures if not re.search(r"no end in \d+ s$", line)]
    environment = report.environment("cpu")
    text = [
        f"{count} random lines composed and validated in one process, {processes} others each in a process of its own, of which {valid} "
        f"ended in a finished run: {len(tracebacks)} tracebacks or unclear ends, {len(failures) - len(tracebacks)} hangs.",
        f"`python scripts/bench_fuzz.py lines={count} processes={processes} seed={seed}`, commit {environment['commit']}.",
    ]
    fill(ROOT / "docs/reliability.md", "lines: written by scripts/bench_fuzz.py", text)
    print("\n".join(text))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
