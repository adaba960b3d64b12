"""Label your own images from a few examples of each class, and say how far to trust the labels."""

import datetime
import shlex
import tempfile
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest

HELP = """metalearn predict support=<examples> query=<images> [key=value …]

Learns your classes from a few examples of each, labels other images, and says how many labels to
expect to be right. Needs no training.

  metalearn predict support=examples query=new               one subfolder of examples per class
  metalearn predict support=examples.csv query='photos/*.jpg'     columns path and label
  metalearn predict support=examples query=new run=<folder>  adapt a trained run as it was trained
  metalearn predict classifier=<out>/classifier query=more   label more images
  metalearn predict classifier=<out>/classifier add=examples2 remove=cat query=more

  support=      folder or zip with one subfolder per class, or a CSV file (path, label)
  query=        files, folder, zip, pattern, or a CSV file (path); may be given several times
  backbone=     pretrained network: efficientnet_lite0 (default), or timm, torchvision with
                backbone.model=<name>
  run=          folder of a trained run, instead of backbone=
  head=         auto (default: cross-validation on the examples chooses, or the run's own method),
                prototype, cosine, logistic, ridge, nearest
  error_rate=0.1    how many images of your classes may be called unknown, or have a set of
                    plausible classes without the right one
  classifier=   a saved classifier, instead of support=; it is not changed. run= names its run if
                an earlier version saved it and the run has moved
  add= remove=  more examples (as support=), also of new classes; classes to leave out (a,b)
  out=          folder to write to (default: outputs/predict/<time>)
  --json        print predictions.json, and nothing else, on standard output

Writes predictions.csv (file, label, probability, second, second_probability, unknown, plausible,
error), predictions.json, report.html and classifier/. A file that cannot be read has an empty
label. `plausible` is a conformal set; it is empty if no class fits well.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}", "support={folder}", "query={folder}", "run={folder}",
    "backbone=efficientnet_lite0|timm|torchvision",
    "head=auto|prototype|cosine|logistic|ridge|nearest", "error_rate=0.1|0.05",
    "classifier={folder}", "add={folder}", "remove=", "out={folder}", "--json",
)  # fmt: skip

_KEYS = (
    "support", "query", "backbone", "run", "head", "error_rate", "classifier", "add", "remove",
    "out",
)  # fmt: skip
_DEFAULT_BACKBONE = "efficientnet_lite0"


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    words = list(args)
    with _arguments.json_document(words) as document:
        document |= _predict(words)
    return 0


def _predict(words: list[str]) -> dict[str, Any]:
    sources = [word.partition("=")[2] for word in words if word.startswith("query=")]
    words = [word for word in words if not word.startswith("query=")]
    given = take_settings("predict", words, _KEYS)
    sources += words
    if ("support" in given) == ("classifier" in given):
        raise UserError(
            "predict: takes support=<examples> or classifier=<folder>; see metalearn predict --help"
        )
    for key in ("add", "remove") if "support" in given else ("backbone", "head"):
        if key in given:
            other = "classifier=" if "support" in given else "support="
            raise UserError(f"{key}={given[key]}: applies to {other}")
    result, out = predict(given, sources)
    from metalearn.report.console import open_console, print_line

    console = open_console()
    for line in result["summary"]:
        print_line(console, line)
    for file in sorted(out.iterdir()):
        print_line(console, f"  {file}")
    return result


def take_settings(command: str, words: list[str], keys: tuple[str, ...]) -> dict[str, str]:
    """Remove a command's `key=…` from its words; settings of a backbone become part of backbone=.

    Raises:
        UserError: For another key or an option, or for run= and backbone= together.
    """
    given = {key: value for key in keys if (value := _arguments.take(words, key)) is not None}
    settings = [word for word in words if word.startswith("backbone.")]
    if settings:
        given["backbone"] = shlex.join([given.get("backbone", _DEFAULT_BACKBONE), *settings])
    words[:] = [word for word in words if word not in settings]
    if other := [word for word in words if "=" in word or word.startswith("-")]:
        hint = nearest(other[0].partition("=")[0], keys)
        raise UserError(f"{other[0]}: {command} takes no such argument{hint}")
    if "run" in given and "backbone" in given:
        raise UserError(f"backbone={given['backbone']}: give it or run=, not both")
    return given


def predict(given: dict[str, str], sources: list[str]) -> tuple[dict[str, Any], Path]:
    """Learn or load a classifier, label images and write the files of HELP.

    Args:
        given: Arguments by name.
        sources: What to label.

    Returns:
        The content of predictions.json, and the folder.

    Raises:
        UserError: For a mistake in the arguments, or an example that cannot be read.
    """
    with tempfile.TemporaryDirectory() as name:
        from metalearn.predict import inputs, report

        unpacked = Path(name)
        items = inputs.queries(sources, unpacked)
        classifier = _classifier(given, unpacked)
        errors: dict[int, str] = {}
        x = classifier.represent([item.path for item in items], errors)
        result = report.labelled(classifier, [item.name for item in items], x, errors)
        time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
        out = Path(given.get("out", f"outputs/predict/{time}")).expanduser()
        try:
            classifier.save(out / "classifier")
            report.write(out, classifier, result, [item.path for item in items])
        except OSError as error:
            raise UserError(f"out={out} cannot be written ({error.strerror})") from None
    return result, out


def open_classifier(given: dict[str, str]) -> Any:
    """Load the classifier that the arguments name, or return one that has learned nothing."""
    from metalearn.predict.classifier import FewShotClassifier

    rate: dict[str, Any] = {}
    if value := given.get("error_rate"):
        try:
            rate["error_rate"] = float(value)
        except ValueError:
            raise ValueError(f"error_rate={value}: should be between 0 and 1") from None
    if "classifier" in given:
        return FewShotClassifier.load(given["classifier"], given.get("run")).set_params(**rate)
    backbone = None if "run" in given else given.get("backbone", _DEFAULT_BACKBONE)
    return FewShotClassifier(backbone, given.get("head", "auto"), run=given.get("run"), **rate)


def _classifier(given: dict[str, str], unpacked: Path) -> Any:
    """Learn a classifier from the arguments, or load and change one."""
    from metalearn.predict import inputs

    try:
        classifier = open_classifier(given)
        if "support" in given:
            return _learn(classifier, inputs.examples(given["support"], unpacked))
        if "add" in given:
            _learn(classifier, inputs.examples(given["add"], unpacked))
        if "remove" in given:
            classifier.forget([name.strip() for name in given["remove"].split(",")])
        elif "error_rate" in given and "add" not in given:
            classifier.forget([])
    except ValueError as error:
        raise UserError(f"predict: {error}") from None
    return classifier


def _learn(classifier: Any, items: list[Any]) -> Any:
    """Learn examples, with their names and thumbnails."""
    from metalearn.predict.report import thumbnail

    unreadable: dict[int, str] = {}
    x = classifier.represent([item.path for item in items], unreadable)
    if unreadable:
        index, reason = next(iter(unreadable.items()))
        raise UserError(
            f"{items[index].name} is not a readable image ({reason}); replace or remove it"
        )
    notes = [{"file": item.name, "thumbnail": thumbnail(item.path)} for item in items]
    return classifier.partial_fit(x, [item.label for item in items], notes=notes)
