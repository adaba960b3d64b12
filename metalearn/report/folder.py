"""The files of a run folder, each named once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalearn.report.result import Result
from metalearn.system.errors import UserError
from metalearn.system.reading import read_json


class RunFolder:
    """The files of one training run; the folder does not need to exist."""

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Name, arguments, working directory and W&B identifier of the command.
        self.command = path / "command.json"
        #: The composed configuration. It exists if and only if a run has started.
        self.config = path / "config.yaml"
        #: The engine's choices, with which `engine.choices=<file>` repeats the computation.
        self.engine = path / "engine.json"
        self.metrics = path / "metrics.jsonl"
        #: The validation result of a training that is not tested, as a search leaves most trials.
        self.validation = path / "validation.json"
        #: The result of the test. It exists if and only if the run is finished.
        self.result = path / "result.json"
        self.scores = path / "test_scores.csv"
        self.classes = path / "test_classes.csv"
        self.curve = path / "learning_curve.png"
        #: The weights of a model that `metalearn export format=safetensors` made, and its card.
        self.model = path / "model.safetensors"
        self.card = path / "README.md"
        self.best = self.model if self.model.is_file() else path / "checkpoints" / "best.pt"
        self.last = path / "checkpoints" / "last.pt"
        self.previous = path / "checkpoints" / "previous.pt"
        #: Results of `metalearn evaluate`.
        self.evaluations = path / "evaluations"
        #: Images of `metalearn plot`.
        self.plots = path / "plots"
        #: The verdict of `metalearn reproduce`.
        self.reproduction = path / "reproduction.json"
        #: Why a run of a multirun failed, and the traceback if the cause is a bug.
        self.error = path / "error.txt"
        self.traceback = path / "traceback.txt"
        #: Tasks with a non-finite loss.
        self.nonfinite = path / "nonfinite"
        self.profile = path / "profile"

    @property
    def is_started(self) -> bool:
        """True if the folder holds a run, finished or not."""
        return self.config.exists()

    @property
    def is_finished(self) -> bool:
        """True if the folder holds a finished run."""
        return self.result.is_file()

    def unfinished(self) -> UserError:
        """Return the error that says that the folder holds no finished run."""
        if self.is_started:
            return UserError(
                f"{self.path}: not finished; to finish it: metalearn resume {self.path}"
            )
        return UserError(f"{self.path}: no run there; name the folder of a finished run")

    @property
    def is_trained(self) -> bool:
        """True if the folder holds a run whose training is finished, tested or not."""
        return self.is_finished or self.validation.is_file()

    def kept(self, step: int) -> Path:
        """Return the checkpoint of a validated step, with `checkpoint.keep`."""
        return self.best.with_name(f"best-{step}.pt")

    def reproduction_of(self, experiment: str) -> Path:
        """Return the verdict about another experiment with the same training."""
        return self.reproduction.with_name(f"reproduction-{experiment}.json")

    def all_kept(self) -> list[Path]:
        """Return the checkpoints that `checkpoint.keep` kept, by step."""
        return sorted(
            (file for file in self.best.parent.glob("best-*.pt") if file.stem[5:].isdecimal()),
            key=lambda file: int(file.stem[5:]),
        )

    def outputs(self) -> Iterator[Path]:
        """Yield the files that a finished run shows to its user."""
        for file in (
            self.result, self.metrics, self.scores, self.classes, self.curve, self.best,
            self.config, self.engine, self.profile / "summary.md",
        ):  # fmt: skip
            if file.exists():
                yield file

    def read_result(self) -> Result:
        """Read the result of the run's own test, or of validation if it is not tested.

        Raise UserError if there is none, or it is not a result.
        """
        is_untested = self.is_trained and not self.is_finished
        return Result.read(self.validation if is_untested else self.result, is_own_test=True)

    def read_command(self) -> dict[str, Any]:
        """Read command.json; raise UserError if it does not exist or is not readable."""
        types = {"name": str, "overrides": [str], "directory?": str, "id?": str}
        return read_json(self.command, types)

    def evaluation_scores(self, evaluation: Path) -> Path:
        """Return the file with the episode scores of an evaluation."""
        return evaluation.with_name(f"{evaluation.stem}_scores.csv")
