"""Export to ONNX, and compare the file in onnxruntime with this package."""

import base64
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from metalearn.predict import heads
from metalearn.predict.classifier import FewShotClassifier
from metalearn.predict.networks import AdaptingRun
from metalearn.run import load
from metalearn.system.errors import RunFailed, UserError, first_line, writing

#: Largest difference of a probability that counts as rounding.
TOLERANCE = 1e-4
#: Ways, shots and queries of the tasks that are compared.
_TASKS = ((5, 2, 7), (3, 1, 1), (8, 3, 20))
_OUTPUT = "probabilities"


class _Graph(nn.Module):
    """A function of tensors, and the names of its inputs and of their axes of any size."""

    def __init__(self, function: Callable[..., Tensor], axes: dict[str, dict[int, str]]) -> None:
        super().__init__()
        self.function, self.axes = function, axes

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Comparison(NamedTuple):
    """Inputs of the graph, and the probabilities that the package's own interface returns."""

    what: str
    inputs: tuple[Tensor, ...]
    expected: Any


def export_classifier(folder: Path, out: Path) -> dict[str, float]:
    """Export a saved classifier: `images` [B, C, H, W] to `probabilities` [B, N].

    Images are float32 in [0, 1], resized and cropped as the file's metadata say; standardisation,
    head and calibration are in the graph. Return the largest difference of a probability between
    onnxruntime and `predict_proba`, by input. Raise RunFailed if it is more than rounding, and
    UserError if the classifier cannot be exported, or a package is missing.
    """
    classifier = FewShotClassifier.load(folder)
    network = classifier.network
    if network is None:
        raise UserError(f"{folder}: learns from feature vectors, so it has no images to export")
    if network.kind == "texts":
        raise UserError(
            f"{folder}: learns from texts, and no ONNX file has their tokenizer; classifiers of "
            "images can be exported"
        )
    is_run = isinstance(network, AdaptingRun)
    temperature = classifier.scale_ * classifier.confidence_.temperature

    def probabilities(images: Tensor) -> Tensor:
        z = network.outputs_of(images)
        if not is_run:
            constants = {
                name: torch.from_numpy(value).to(z.device, torch.float32)
                for name, value in classifier.learned_.items()
            }
            z = heads.tensor_logits(classifier.head_, constants, z)
        return (z / temperature).softmax(-1)

    rng = np.random.default_rng(0)
    noise = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        for size in rng.integers(40, 300, (8, 2))
    ]
    stored = [note["thumbnail"] for note in classifier.notes_ if note.get("thumbnail")]
    own: list[Image.Image] = [Image.open(io.BytesIO(base64.b64decode(one))) for one in stored[:16]]
    batches = {"3 random images": noise[:3], "1 random image": noise[:1], "8 random images": noise}
    if own:
        batches[f"{len(own)} of its examples"] = own
    comparisons = [
        Comparison(what, (network.pixels(images),), classifier.predict_proba(images))
        for what, images in batches.items()
    ]
    metadata = {"classes": json.dumps(classifier.classes_.tolist()), **network.preprocessing()}
    graph = _Graph(probabilities, {"images": {0: "images"}})
    return _export(graph, comparisons, metadata, out, str(folder))


def export_run(folder: Path, out: Path) -> dict[str, float]:
    """Export a run's method: support images, labels and query images to probabilities [Q, N].

    Inputs are `support_images` [M, *X], one-hot `support_labels` [M, N] and `query_images`
    [Q, *X], float32, images in [0, 1], for any M, N and Q. Differences are from the model of
    `metalearn.load`; results and errors as in `export_classifier`.
    """
    model = load.load(folder, device="cpu")
    where = f"run={folder} (algo={model.config.algo._target_.rpartition('.')[2]})"
    if model.spec.target != "class" or model.spec.inputs.kind == "tokens":
        raise UserError(f"{where} cannot be exported: it does not classify images or features")
    if reason := model.why_not_alone:
        raise UserError(f"{where} cannot be exported: {reason}")
    comparisons = []
    generator = torch.Generator().manual_seed(0)
    for some_way, shots, queries in _TASKS:
        way = model.way or some_way
        y = torch.cat([torch.arange(way).repeat(shots), torch.zeros(1, dtype=torch.int64)])
        # Inputs around a random centre of each class: for mere noise, probabilities hardly vary.
        shape = model.spec.input_shape
        centres = torch.rand(way, *shape, generator=generator)
        support, query = (
            centres[rows].lerp(torch.rand(len(rows), *shape, generator=generator), 0.3)
            for rows in (y, torch.arange(queries) % way)
        )
        expected = model.adapt(support, y).probabilities(query)
        what = f"{way} classes, {len(y)} support and {queries} query images"
        comparisons.append(Comparison(what, (support, torch.eye(way)[y], query), expected))
    labels_axes = {0: "examples"} | ({} if model.way else {1: "classes"})
    axes = {"support_images": {0: "examples"}, "support_labels": labels_axes}
    graph = _Graph(model.task_probabilities, axes | {"query_images": {0: "queries"}})
    return _export(graph, comparisons, {}, out, where)


def _export(
    graph: _Graph,
    comparisons: Sequence[Comparison],
    metadata: dict[str, str],
    out: Path,
    where: str,
) -> dict[str, float]:
    """Export a graph, traced on the first inputs, and compare it on all; errors name `where`."""
    try:
        import onnxruntime

        from metalearn.predict.onnx_solve import TRANSLATIONS, LinearAlgebra
    except ModuleNotFoundError as error:
        raise UserError(
            f"export: {error.name} is not installed; pip install 'metalearn-lab[export]'"
        ) from None
    dims = {name: torch.export.Dim(name) for one in graph.axes.values() for name in one.values()}
    shapes = tuple({axis: dims[name] for axis, name in one.items()} for one in graph.axes.values())
    try:
        with LinearAlgebra(), torch.no_grad():
            graph(*comparisons[0].inputs)
        with _quietly(), torch.no_grad():
            program: Any = torch.onnx.export(
                graph.eval(), comparisons[0].inputs, dynamo=True, dynamic_shapes=(shapes,),
                verbose=False, input_names=list(graph.axes), output_names=[_OUTPUT],
                custom_translation_table=TRANSLATIONS,
            )  # fmt: skip
    except Exception as error:  # the exporter's errors are of many kinds
        cause = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        raise UserError(f"{where} cannot be exported: {first_line(cause)}") from None
    opset = program.model.opset_imports[""]
    program.model.metadata_props.update(metadata | {"opset": str(opset)})
    with writing(f"out={out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(out), external_data=False)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    differences = {}
    for one in comparisons:
        arrays = {name: x.cpu().numpy() for name, x in zip(graph.axes, one.inputs, strict=True)}
        try:
            (found,) = session.run([_OUTPUT], arrays)
        except Exception as error:  # a size that is fixed in the graph, for example
            raise RunFailed(f"{out}: onnxruntime fails for {one.what}: {error}") from None
        differences[one.what] = float(np.abs(found - np.asarray(one.expected)).max())
    worst = max(differences, key=lambda what: np.nan_to_num(differences[what], nan=np.inf))
    if not differences[worst] <= TOLERANCE:
        raise RunFailed(
            f"{out}: probabilities differ from this package's by {differences[worst]:.1e}, more "
            f"than {TOLERANCE:.0e} ({worst})"
        )
    return differences


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
