"""Export to ONNX, and compare the file in onnxruntime with this package."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metalearn.predict import heads
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.networks import AdaptingRun
from metalearn.run import load
from metalearn.system.errors import RunFailed, UserError, first_line

#: Largest difference of a probability that counts as rounding.
_TOLERANCE = 1e-4
Function = Callable[..., Tensor]


class _Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._function(*inputs)


def export_classifier(folder: Path, out: Path) -> float:
    """Export a saved classifier: `images` [B, C, H, W] to `probabilities` [B, N].

    Images are float32 in [0, 1], resized and cropped as the file's metadata say; standardisation,
    head and calibration are in the graph.

    Args:
        folder: Folder of the classifier.
        out: File to write.

    Returns:
        The largest difference of a probability between onnxruntime and this package.

    Raises:
        UserError: If it cannot be exported, or a package is missing.
        RunFailed: If the probabilities differ.
    """
    classifier = FewShotClassifier.load(folder)
    network, learned = classifier.network, classifier.learned_
    if network is None:
        raise UserError(f"{folder}: learns from feature vectors, so it has no images to export")
    constants = {
        name: torch.from_numpy(value.astype(np.int64 if value.dtype.kind == "i" else np.float32))
        for name, value in learned.items()
    }
    temperature = classifier.scale_ * classifier.confidence_.temperature

    def probabilities(images: Tensor) -> Tensor:
        z = network.outputs_of(images)
        if not isinstance(network, AdaptingRun):
            z = heads.tensor_logits(classifier.head_, constants, z)
        return (z / temperature).softmax(-1)

    shape = network.image_shape()
    images = [(torch.rand(size, *shape),) for size in (3, 1, 8)]
    metadata = {"classes": json.dumps(classifier.classes_.tolist()), **network.preprocessing()}
    return _export(probabilities, ("images",), ({0: "images"},), images, metadata, out, str(folder))


def export_run(folder: Path, out: Path) -> float:
    """Export a run's method: support images, labels and query images to probabilities [Q, N].

    Inputs are `support_images` [M, *X], one-hot `support_labels` [M, N] and `query_images`
    [Q, *X], float32, images in [0, 1], for any M, N and Q.

    Args:
        folder: Folder of the run.
        out: File to write.

    Returns:
        See `export_classifier`, which raises the same errors.
    """
    model = load.load(folder, device="cpu")
    where = f"run={folder} (algo={model.config.algo._target_.rpartition('.')[2]})"
    if model.spec.target != "class" or model.spec.inputs.kind == "tokens":
        raise UserError(f"{where} cannot be exported: it does not classify images or features")
    if reason := model.why_not_alone:
        raise UserError(f"{where} cannot be exported: {reason}")
    shape, way = model.spec.input_shape, model.spec.way
    ways = (way, way, way) if model.has_fixed_way else (5, 3, 8)
    tasks = []
    for number, shots, queries in zip(ways, (2, 1, 3), (7, 1, 20), strict=True):
        labels = torch.eye(number).repeat(shots, 1)
        tasks.append((torch.rand(len(labels), *shape), labels, torch.rand(queries, *shape)))
    names = ("support_images", "support_labels", "query_images")
    labels_axes = {0: "examples"} | ({} if model.has_fixed_way else {1: "classes"})
    axes = ({0: "examples"}, labels_axes, {0: "queries"})
    return _export(model.task_probabilities, names, axes, tasks, {}, out, where)


def _export(
    function: Function,
    names: Sequence[str],
    axes: Sequence[dict[int, str]],
    examples: Sequence[tuple[Tensor, ...]],
    metadata: dict[str, str],
    out: Path,
    where: str,
) -> float:
    """Export a function, and compare it with the file on each of the examples.

    Args:
        function: Tensors to probabilities.
        names: Names of its inputs.
        axes: Names of the axes of each input that may have any size.
        examples: Inputs; the first traces the function.
        metadata: What to store beside the graph.
        out: File to write.
        where: What is exported, for errors.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"export: {error.name} is not installed; pip install 'metalearn-lab[export]'"
        ) from None
    dims = {name: torch.export.Dim(name) for one in axes for name in one.values()}
    shapes = tuple({axis: dims[name] for axis, name in one.items()} for one in axes)
    module = _Module(function).eval()
    with torch.no_grad():  # before the export: a network may be built at its first use
        expected = [module(*inputs) for inputs in examples]
    try:
        with _quietly(), torch.no_grad():
            program: Any = torch.onnx.export(
                module, examples[0], dynamo=True, dynamic_shapes=(shapes,), verbose=False,
                input_names=names, output_names=["probabilities"],
            )  # fmt: skip
    except Exception as error:  # the exporter's errors are of many kinds
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise UserError(f"{where} cannot be exported: {first_line(cause)}") from None
    program.model.metadata_props.update(metadata)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(out), external_data=False)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror})") from None
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs, own in zip(examples, expected, strict=True):
        (found,) = session.run(
            None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        )
        worst = max(worst, float((torch.from_numpy(found) - own).abs().max()))
    if not worst <= _TOLERANCE:
        raise RunFailed(f"{out}: probabilities differ by {worst:.1e} from this package's")
    return worst


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Discard what the exporter prints."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
