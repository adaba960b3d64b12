"""A trained run from Python: adapt it to a few labelled examples, predict others; needs the run folder and no data."""

from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from metalearn.config import checking, components, composition, schema
from metalearn.config import plugins as registry
from metalearn.run import checkpoint
from metalearn.run.build import algorithm_of, check_population, device_of, inductive_statistics
from metalearn.system.errors import UserError, first_line
from metalearn.tasks import prng
from metalearn.tasks.types import Spec, Support

#: Random stream of the choices a method makes while it adapts here.
_ADAPT_STREAM = 200


def load(
    run_folder: str | Path,
    statistics: str | None = None,
    device: str = "auto",
    plugins: Iterable[str] = (),
) -> "Model":
    """Load the best checkpoint of a finished run, ready to adapt.

    Args:
        run_folder: of the run.
        statistics: of the normalisation at prediction. None: inductive ones ("population" where the run has them, else
            "support"), so that a prediction does not depend on the other queries; "query" for the transductive ones that
            most published results of MAML's family use.
        device: "auto", "cpu" or "cuda".
        plugins: packages whose classes the run may use; the run's own files cannot name any.

    Raises:
        UserError: where no such run exists, or it has no such statistics.
    """
    registry.add(plugins)
    folder = Path(run_folder)
    composed = composition.stored(folder)
    settings = checking.checked(composed)
    if statistics is None:
        statistics = inductive_statistics(settings)
    check_population(settings, statistics)
    asked: Any = OmegaConf.merge(composed, {"statistics": statistics, "device": device})
    settings = checking.checked(asked)
    kept = checkpoint.load(folder / "checkpoints" / "best.pt", device_of(settings.device))
    if "spec" not in kept:
        raise UserError(
            f"{folder}: its checkpoint does not say what its inputs are; train it again with this version"
        )
    return Model(composed, settings, kept, folder)


class Model:
    """What `metalearn.load` gives.

    config: the composed configuration; spec: shape of the inputs, number of ways and kind of target of the run;
    classes: the labels of the last `adapt`, in the order of the columns of `probabilities`.
    """

    def __init__(
        self, composed: DictConfig, settings: schema.RunConfig, kept: dict[str, Any], folder: Path
    ) -> None:
        self.config = composed
        self.spec = Spec(**kept["spec"] | {"input_shape": tuple(kept["spec"]["input_shape"])})
        self.classes: list[Hashable] = []
        self._algorithm = algorithm_of(settings, is_restored=True)
        if not self._algorithm.family.predicts:
            raise UserError(
                f"{folder}: its tasks are not learned from examples, so there is nothing to adapt to here"
            )
        self._dataset = components.make(settings.dataset, "dataset")
        untrained = self._algorithm.init(self.spec, prng.key_of(0))
        self._state = checkpoint.state(kept, untrained, folder)
        self._standardisation = kept["standardisation"]
        self._device = next(iter(self._state.params.values())).device
        self._learner: Any = None

    def inputs(self, x: Any) -> Tensor:
        """Inputs [M, *X] as the network sees them.

        Args:
          x: picture files, which are read as the run's data set reads its own; or an array, tensor or nested list
            [M, C, H, W] of uint8 or of floats in [0, 1] (for handwriting, ink is 1); feature vectors [M, D]; or tokens [M, L].
        Raises: UserError for what the run cannot take, or a file that is no picture.
        """
        kind = self.spec.inputs.kind
        pictures = kind == "images"
        items = [x] if isinstance(x, str | Path) else x
        if not hasattr(items, "__len__"):
            items = list(items)  # a generator, or what Path.glob gives
        if len(items) and all(isinstance(item, str | Path) for item in items):
            items = torch.stack([self._picture(Path(item)) for item in items])
        try:
            found = torch.as_tensor(items)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"x is no array of numbers and no list of picture files ({first_line(error)})"
            ) from None
        if found.shape[1:] != self.spec.input_shape:
            wanted = ", ".join(map(str, self.spec.input_shape))
            raise UserError(f"x has shape {tuple(found.shape)}; this run wants [M, {wanted}]")
        if pictures and found.dtype == torch.uint8:
            found = found / 255
        found = found.to(self._device, torch.int64 if kind == "tokens" else torch.float32)
        if (
            kind == "tokens"
            and len(found)
            and not 0 <= found.min() <= found.max() < (self.spec.vocabulary or 0)
        ):
            raise UserError(
                f"x holds tokens outside 0 to {(self.spec.vocabulary or 0) - 1}, the run's vocabulary"
            )
        if not found.isfinite().all():
            raise UserError("x holds values that are not finite")
        if pictures and len(found) and not 0 <= found.min() <= found.max() <= 1:
            raise UserError(
                "x holds values outside [0, 1]; give pictures as uint8, or as floats in [0, 1]"
            )
        if self._standardisation:
            shift, scale = (
                torch.tensor(self._standardisation[name], device=self._device).view(-1, 1, 1)
                for name in ("shift", "scale")
            )
            found = (found - shift) * scale
        return found

    def _picture(self, path: Path) -> Tensor:
        if not hasattr(self._dataset, "to_array"):
            raise UserError(f"{path}: this run does not take pictures")
        try:
            with Image.open(path) as picture:
                return torch.from_numpy(self._dataset.to_array(picture).copy())
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"{path} is not a readable picture ({error})") from None

    @torch.no_grad()
    def adapt(self, x: Any, y: Any, steps: int | None = None, unlabelled: Any = None) -> "Model":
        """Learn from labelled examples, starting from the meta-trained state each time.

        Args:
            x: inputs, see `inputs`.
            y: a label for each, of any kind that can be compared for equality; for regression targets [M, D].
            steps: adaptation steps; None: as the run was tested.
            unlabelled: more inputs without labels, for methods that learn from them.

        Returns:
            The model itself.

        Raises:
            UserError: where the numbers of examples, labels or classes do not fit.
        """
        x = self.inputs(x)
        if unlabelled is not None and not self._algorithm.uses_unlabelled:
            raise UserError(
                "unlabelled: this run's method does not learn from unlabelled examples; leave it out"
            )
        if steps is not None and (steps < 0 or not self._algorithm.adapts_in_steps):
            raise UserError(
                f"steps={steps}: should be at least 0, and left out where the method does not adapt in steps"
            )
        classes: list[Hashable] = []
        way = self.spec.way
        if self.spec.target == "class":
            try:
                labels = [label.item() if hasattr(label, "item") else label for label in y]
                classes = list(dict.fromkeys(labels))
            except (TypeError, ValueError, RuntimeError):
                raise UserError(
                    "y should be one label for each example: numbers, words, or an array [M]"
                ) from None
            way = len(classes)
            target = torch.tensor([classes.index(label) for label in labels], device=self._device)
            if self._algorithm.fixed_way and way != self.spec.way:
                raise UserError(
                    f"y has {way} classes; this run tells {self.spec.way} apart, the number of ways is part of its weights"
                )
        else:
            target = torch.as_tensor(y, dtype=torch.float32, device=self._device)
            if target.shape[1:] != (way,):
                raise UserError(f"y has shape {tuple(target.shape)}; this run wants [M, {way}]")
        if len(target) != len(x) or not len(x):
            raise UserError(
                f"x has {len(x)} examples and y {len(target)}; they should be as many, and at least one"
            )
        key = prng.key_of(self.config.seed, _ADAPT_STREAM, device=self._device)
        support = Support(x, target, way, None if unlabelled is None else self.inputs(unlabelled))
        self._learner = self._algorithm.adapt(self._state, support, key=key, steps=steps)
        self.classes = classes
        return self

    @torch.no_grad()
    def _outputs(self, x: Any) -> Tensor:
        if self._learner is None:
            raise UserError("nothing has been learned yet; call adapt(x, y) first")
        return self._algorithm.predict(self._state, self._learner, self.inputs(x))

    def predict(self, x: Any) -> Any:
        """The label of each input, a list [Q]; for regression values [Q, D]."""
        outputs = self._outputs(x)
        if self.spec.target != "class":
            return outputs
        return [self.classes[number] for number in outputs.argmax(-1).tolist()]

    def probabilities(self, x: Any) -> Tensor:
        """The share the network gives each class [Q, N], columns as in `classes`."""
        if self.spec.target != "class":
            raise UserError("probabilities are for classes; this run predicts values")
        return self._outputs(x).softmax(-1)
