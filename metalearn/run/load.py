"""Use a trained run from Python: adapt to a few labelled examples and predict others.

This requires the run folder, but not the run's data.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from metalearn.algorithms.params import select
from metalearn.config import checking, components, composition, schema
from metalearn.config import plugins as registry
from metalearn.report.folder import RunFolder
from metalearn.run import checkpoint, features
from metalearn.run.inputs import Reader
from metalearn.run.pairings import check_population, inductive_statistics, is_transductive
from metalearn.run.parts import algorithm_of, device_of, support_augmentation_of
from metalearn.system.errors import UserError
from metalearn.system.reading import check_types
from metalearn.tasks import prng
from metalearn.tasks.types import Params, Spec, Support

#: Random stream of adaptation outside of episodes.
_ADAPT_STREAM = 200
#: Number of input values that go through the network at once.
_CHUNK = 2**18
_NOT_ADAPTED = "the model is not adapted yet; call adapt(x, y) first"
#: What a checkpoint says about the inputs and outputs of its run.
_DESCRIPTION = {
    "spec": {"input_shape": [int], "way": int, "train_classes": int, "target": str},
    "standardisation": checkpoint.STANDARDISATION,
}


def load(
    run_folder: str | Path,
    statistics: str | None = None,
    device: str = "auto",
    plugins: Iterable[str] = (),
) -> "Model":
    """Load the best checkpoint of a finished run, ready to adapt.

    Args:
        run_folder: The run folder.
        statistics: Normalisation statistics at prediction. None: inductive ones ("population" if
            the run has them, else "support"), so that a prediction does not depend on the other
            queries. "query": the transductive ones, as in most published results of MAML's family.
        device: "auto", "cpu" or "cuda".
        plugins: Packages whose classes the run may use; the run's own files cannot name any.

    Raises:
        UserError: If there is no such run, or it has no such statistics.
    """
    registry.add(plugins)
    folder = Path(run_folder)
    files = RunFolder(folder)
    if not (files.is_started and files.best.exists()):
        raise files.unfinished()
    composed = composition.load_config(folder)
    settings = checking.check_config(composed)
    if statistics is None:
        statistics = inductive_statistics(settings)
    check_population(settings, statistics)
    changed: Any = OmegaConf.merge(composed, {"statistics": statistics, "device": device})
    settings = checking.check_config(changed)
    content = checkpoint.load(files.best, device_of(settings.device))
    try:
        check_types(content, _DESCRIPTION)
        spec = content["spec"]
        content["spec"] = Spec(**{**spec, "input_shape": tuple(spec["input_shape"])})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{folder}: its checkpoint does not describe its inputs ({error}); train it again with "
            "this version"
        ) from None
    return Model(composed, settings, content, folder)


class Model(Reader):
    """A trained method that adapts to labelled examples; `metalearn.load` returns it.

    Attributes:
        config: The composed configuration.
        spec: Shape of the inputs, number of ways and kind of target of the run.
        device: Where the model computes.
        classes: The labels of the last `adapt`, in the order of the columns of `probabilities`.
        way: The number of classes that `adapt` requires; None for any.
        embeds_alone: Whether the features of an input depend on no other input.
        is_transductive: Whether a prediction depends on the other queries.
    """

    def __init__(
        self,
        composed: DictConfig,
        settings: schema.RunConfig,
        content: dict[str, Any],
        folder: Path,
    ) -> None:
        spec: Spec = content["spec"]
        self._algorithm = algorithm_of(settings, is_restored=True)
        if not self._algorithm.family.predicts:
            raise UserError(
                f"{folder}: its tasks have no labelled examples; metalearn.load requires a run "
                "with some"
            )
        self._state = checkpoint.state(content, self._algorithm.init(spec, prng.key_of(0)), folder)
        super().__init__(
            spec,
            components.make(settings.dataset, "dataset"),
            self._algorithm.backbone,
            content["standardisation"],
            next(iter(self._state.params.values())).device,
        )
        self.config = composed
        self.classes: list[Hashable] = []
        self.way = spec.way if self._algorithm.fixed_way else None
        self.embeds_alone = features.embeds_alone(self._algorithm)
        self.is_transductive = is_transductive(self._algorithm)
        self._key = prng.key_of(composed.seed, _ADAPT_STREAM, device=self.device)
        self._augment_support = support_augmentation_of(settings, self._algorithm)
        self._learner: Any = None
        self._support: Tensor | None = None

    @torch.no_grad()
    def adapt(self, x: Any, y: Any, steps: int | None = None, unlabelled: Any = None) -> "Model":
        """Learn from labelled examples, starting from the meta-trained state each time.

        Args:
            x: Inputs, see `inputs`.
            y: A hashable label for each input; for regression, targets [M, D].
            steps: Number of adaptation steps; None: as in the run's test.
            unlabelled: More inputs without labels, for methods that learn from them.

        Returns:
            The model itself.

        Raises:
            UserError: If the numbers of examples, labels or classes do not fit.
        """
        x = self._raw(x)
        if unlabelled is not None and not self._algorithm.uses_unlabelled:
            raise UserError(
                "unlabelled: this run's method does not learn from unlabelled examples; leave it "
                "out"
            )
        if steps is not None and (steps < 0 or not self._algorithm.adapts_in_steps):
            raise UserError(
                f"steps={steps}: should be at least 0; leave it out if the method does not adapt "
                "in steps"
            )
        classes: list[Hashable] = []
        way = self.spec.way
        if self.spec.target == "class":
            try:
                labels = [label.item() if hasattr(label, "item") else label for label in y]
                classes = list(dict.fromkeys(labels))
            except (TypeError, ValueError, RuntimeError):
                raise UserError(
                    "y should be one label for each example: numbers, strings, or an array [M]"
                ) from None
            way = len(classes)
            target = torch.tensor([classes.index(label) for label in labels], device=self.device)
            if self.way not in (None, way):
                raise UserError(
                    f"{way} classes in the examples; this run distinguishes {self.way}, the number "
                    "of ways is part of its weights"
                )
        else:
            target = torch.as_tensor(y, dtype=torch.float32, device=self.device)
            if target.shape[1:] != (way,):
                raise UserError(f"y has shape {tuple(target.shape)}; this run requires [M, {way}]")
        if len(target) != len(x) or not len(x):
            raise UserError(
                f"x has {len(x)} examples and y {len(target)}; the numbers should be equal and at "
                "least 1"
            )
        if self._augment_support is not None:
            copies = self._algorithm.support_copies
            x, target = x.repeat_interleave(copies, 0), target.repeat_interleave(copies, 0)
            x = self._augment_support(x, prng.fold_in(self._key, torch.arange(len(x)).to(x.device)))
        x = self._standardised(x)
        support = Support(x, target, way, None if unlabelled is None else self.inputs(unlabelled))
        self._learner = self._algorithm.adapt(self._state, support, key=self._key, steps=steps)
        self.classes, self._support = classes, x
        return self

    @torch.no_grad()
    def _in_chunks(self, function: Callable[[Tensor], Tensor], x: Any, size: int) -> Tensor:
        """Apply a function of inputs [Q, *X] that returns [Q, size]: to all at once if it must."""
        items = self._items(x)
        chunk = max(1, _CHUNK // math.prod(self.spec.input_shape))
        if self.is_transductive:
            chunk = max(1, len(items))
        parts = [
            function(self.inputs(items[start : start + chunk]))
            for start in range(0, len(items), chunk)
        ]
        return torch.cat(parts) if parts else torch.zeros(0, size, device=self.device)

    def embed(self, x: Any) -> Tensor:
        """Compute the features [M, D] of inputs by the meta-trained backbone.

        Adaptation does not change them, except that a run without population statistics
        normalises by the examples of the last `adapt`, or with statistics="query" by `x` itself.

        Raises:
            UserError: As in `inputs`; or if `adapt` is needed first.
        """
        normalisation, backbone = self._algorithm.normalisation, self._algorithm.backbone
        reference: Params = {}
        is_alone = normalisation.is_transductive or normalisation.has_population
        if backbone.normalises and not is_alone:
            if self._support is None:
                raise UserError(_NOT_ADAPTED)
            with torch.no_grad():
                net = select(self._state.params, "net")
                reference = normalisation.reference(net, self._support)
        width = math.prod(backbone.shape(self.spec.inputs))
        return self._in_chunks(lambda x: self._features(x, reference), x, width)

    def _features(self, x: Tensor, reference: Params) -> Tensor:
        net = select(self._state.params, "net")
        return self._algorithm.normalisation.embed_queries(self._state, net, reference, x, None)[0]

    def task_probabilities(self, support_x: Tensor, labels: Tensor, query_x: Tensor) -> Tensor:
        """Compute probabilities [Q, N] of one task, as a function of tensors alone, for export.

        Args:
            support_x: Float32 [M, *X]; images are in [0, 1].
            labels: One-hot, float32 [M, N].
            query_x: Float32 [Q, *X].
        """
        support = Support(self._standardised(support_x), labels.argmax(-1), labels.shape[-1])
        learner = self._algorithm.adapt(self._state, support, key=self._key)
        outputs = self._algorithm.predict(self._state, learner, self._standardised(query_x))
        return outputs.softmax(-1)

    def tensor_outputs(self, x: Tensor, embed: bool = False) -> Tensor:
        """Compute logits [Q, N] after `adapt`, or features [Q, D], as a function of a tensor.

        Args:
            x: Float32 [Q, *X]; images are in [0, 1].
            embed: Whether to return the features of the meta-trained backbone, which must depend on
                each input alone.
        """
        x = self._standardised(x)
        if embed:
            return self._features(x, {})
        return self._algorithm.predict(self._state, self._learner, x)

    @property
    def why_not_alone(self) -> str | None:
        """Why a task is no function of a few tensors that a graph can have; None if it is one."""
        if self.is_transductive:
            return "its predictions depend on the other queries"
        if self._algorithm.takes_gradients:
            return "it learns by gradients of the support set's loss, which ONNX cannot compute"
        if self._algorithm.support_order_matters:
            return "it reads the support examples one after the other"
        if self._algorithm.support_copies:
            return "it learns from augmented copies of the examples (algo.support_copies)"
        return None

    def _outputs(self, x: Any) -> Tensor:
        if self._learner is None:
            raise UserError(_NOT_ADAPTED)
        width = len(self.classes) or self.spec.way
        return self._in_chunks(
            lambda x: self._algorithm.predict(self._state, self._learner, x), x, width
        )

    def predict(self, x: Any) -> Any:
        """Predict the label of each input, a list [Q]; for regression, values [Q, D].

        Inputs are computed in chunks, so any number fits in memory, unless predictions depend on
        each other (statistics="query", or a transductive method).
        """
        outputs = self._outputs(x)
        if self.spec.target != "class":
            return outputs
        return [self.classes[index] for index in outputs.argmax(-1).tolist()]

    def probabilities(self, x: Any) -> Tensor:
        """Predict the probability of each class [Q, N], columns as in `classes`."""
        if self.spec.target != "class":
            raise UserError("probabilities are for classes; this run predicts values")
        return self._outputs(x).softmax(-1)
