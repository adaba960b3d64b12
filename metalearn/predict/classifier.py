"""FewShotClassifier: a scikit-learn classifier that learns from a few examples of each class."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from metalearn.predict import heads, saved
from metalearn.predict.choice import HeadChoice
from metalearn.predict.confidence import Confidence, Label, Outputs, assess, hold_out
from metalearn.predict.networks import AdaptingRun, Network, open_network
from metalearn.system.errors import UserError


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Learn classes from a few images or texts of each, or from feature vectors.

    Args:
        backbone: A pretrained backbone: for images, such as "efficientnet_lite0" or "timm
            backbone.model=resnet18"; for texts "text_encoder", "text_encoder
            backbone.model=<folder>" or "bag_of_ngrams". Or a function from a list of images or
            texts to features [M, D]; or None, if `X` is feature vectors.
        head: "prototype", "cosine", "logistic", "ridge" or "nearest"; "auto" chooses by
            cross-validation on the examples or, with `run`, adapts as the run was trained.
        run: Folder of a trained run to use instead of a backbone.
        normalise: "l2" (each feature vector by its norm), "standard" (each feature by its mean and
            standard deviation over the examples), or "auto": "standard" for feature vectors given
            as such, else "l2".
        cost: `C` of the logistic regression, and the inverse of the penalty of the ridge.
        calibrate: Whether to calibrate probabilities by cross-validation. Without it there is no
            estimate of the accuracy, no `unknown` and no set of plausible classes.
        error_rate: Share of examples of the classes that may be called `unknown`, and whose class
            may be missing in `plausible`.
        random_state: Seed of the folds.

    Attributes:
        classes_: The classes, sorted.
        head_: The head that is used; "run" for a run that adapts as it was trained.
        confidence_: What cross-validation says about new labels.
    """

    def __init__(
        self,
        backbone: Any = None,
        head: str = "auto",
        *,
        run: str | Path | None = None,
        normalise: str = "auto",
        cost: float = 1.0,
        calibrate: bool = True,
        error_rate: float = 0.1,
        random_state: int = 0,
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.run = run
        self.normalise = normalise
        self.cost = cost
        self.calibrate = calibrate
        self.error_rate = error_rate
        self.random_state = random_state

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the network, which opens again when it is needed."""
        state: dict[str, Any] = super().__getstate__()
        return {key: value for key, value in state.items() if key != "_network"}

    @property
    def network(self) -> Network | None:
        """Return the network, opened at first use; None for feature vectors."""
        if "_network" not in self.__dict__:
            network = open_network(self.backbone, self.run, self.head != "auto")
            if isinstance(network, AdaptingRun) and hasattr(self, "examples_"):
                network.adapt(self.examples_, self.targets_)
            self._network = network
        return self._network

    def use(self, network: Network) -> "FewShotClassifier":
        """Use an open network, instead of opening the same one again."""
        self._network = copy.copy(network)
        return self

    @property
    def labels_(self) -> np.ndarray:
        """The class of each example [M]."""
        labels: np.ndarray = self.classes_[self.targets_]
        return labels

    @property
    def kind(self) -> str:
        """Return "images", "texts" or "features": what it learns from."""
        return "features" if self.network is None else self.network.kind

    def represent(self, X: Any, unreadable: dict[int, str] | None = None) -> np.ndarray:
        """Convert images or texts to what is learned from; `fit` and `predict` accept it too.

        Args:
            X: A list of image files or PIL images, or of strings; or the result of an earlier call.
            unreadable: Gets the reason for each one that cannot be read, by its index.

        Raises:
            UserError: For one that cannot be read, if `unreadable` is None; for a single string.
        """
        if isinstance(X, str | Path):
            raise UserError(f"X={str(X)[:40]!r}: should be a list, of images or of texts")
        if self.network is None or (isinstance(X, np.ndarray) and X.dtype.kind in "fiu"):
            return np.asarray(X)
        return self.network.represent(list(X), unreadable)

    def fit(self, X: Any, y: Any, notes: Sequence[dict[str, Any]] | None = None) -> Any:
        """Learn from examples, and return the classifier itself.

        Args:
            X: Images or texts, see `represent`; or feature vectors [M, D] if there is no network.
            y: The class of each [M]; any number of each of at least two classes.
            notes: What to save with each example, for JSON.
        """
        self._set_examples(*self._examples(X, y, reset=True), notes)
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, notes: Sequence[dict[str, Any]] | None = None
    ) -> Any:
        """Learn from more examples, of known or new classes; equals `fit` on all of them.

        Arguments as in `fit`; after the first call, one class suffices. `classes` is ignored.
        """
        if not hasattr(self, "classes_"):
            return self.fit(X, y, notes)
        x, labels = self._examples(X, y, reset=False)
        more = list(notes) if notes is not None else [{}] * len(x)
        x, labels = np.concatenate([self.examples_, x]), np.concatenate([self.labels_, labels])
        self._set_examples(x, labels, self.notes_ + more)
        return self

    def forget(self, classes: Sequence[Any]) -> Any:
        """Remove classes with their examples; raise ValueError unless two or more remain."""
        check_is_fitted(self)
        if missing := [one for one in classes if one not in self.classes_.tolist()]:
            raise ValueError(f"there is no class {missing[0]!r}")
        labels = self.labels_
        stays = ~np.isin(labels, list(classes))
        notes = [note for note, one in zip(self.notes_, stays, strict=True) if one]
        self._set_examples(self.examples_[stays], labels[stays], notes)
        return self

    def _examples(self, X: Any, y: Any, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        if self.network is None:
            X, y = validate_data(self, X, y, reset=reset, dtype=np.float64)
        else:
            X = self.represent(X)
        check_classification_targets(y)
        labels = column_or_1d(y, warn=True)
        if len(labels) != len(X):
            raise ValueError(f"{len(X)} examples have {len(labels)} labels")
        return X, labels

    def check_settings(self) -> None:
        """Check the settings, as `fit` does; raise ValueError for a wrong one."""
        if self.head not in (*heads.HEADS, "auto"):
            raise ValueError(f"head={self.head}: should be auto, {', '.join(heads.HEADS)}")
        if self.normalise not in ("auto", "l2", "standard"):
            raise ValueError(f"normalise={self.normalise}: should be auto, l2 or standard")
        if not 0 < self.error_rate < 1:
            raise ValueError(f"error_rate={self.error_rate}: should be between 0 and 1")

    def _set_examples(
        self, x: np.ndarray, labels: np.ndarray, notes: Sequence[dict[str, Any]] | None
    ) -> None:
        """Learn examples; a failure leaves the classifier as it was."""
        self.check_settings()
        classes, targets = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"the examples have {len(classes)} class; at least 2 are required")
        before = self.__getstate__()
        self.classes_, self.targets_, self.examples_ = classes, targets.astype(np.int64), x
        self.notes_ = list(notes) if notes is not None else [{}] * len(x)
        try:
            self._learn()
        except Exception:
            self.__dict__ = before
            raise

    def _learn(self) -> None:
        """Choose and learn the head, and assess it."""
        x, y, way = self.examples_, self.targets_, len(self.classes_)
        self.normalise_, self.learned_, self.head_, self.scale_ = self.normalise, {}, "run", 1.0
        if isinstance(run := self.network, AdaptingRun):
            seed = self.random_state
            held_out = hold_out(run.procedure, x, y, way, 1, seed) if self.calibrate else None
            run.adapt(x, y)
        else:
            x = x.astype(np.float64)
            if self.normalise == "auto":
                self.normalise_ = "standard" if self.network is None else "l2"
            choice = HeadChoice(self.head, self.normalise_, self.cost, self.random_state)
            self.head_, self.scale_, held_out = choice.made(x, y, way, self.calibrate)
            self.learned_ = heads.learn(self.head_, self.normalise_, x, y, way, self.cost)
        self.confidence_ = assess(held_out, way, self.error_rate)

    def _evaluate(self, X: Any) -> Outputs:
        """Compute log-probabilities and novelty of images, texts or feature vectors."""
        check_is_fitted(self)
        if self.network is None:
            x = validate_data(self, X, reset=False, dtype=np.float64)
        else:
            x = self.represent(X)
        if isinstance(self.network, AdaptingRun):
            logits, novelty = self.network.outputs(x)
        else:
            x = x.astype(np.float64)
            logits = heads.logits(self.head_, self.learned_, x) / self.scale_
            novelty = heads.novelty(self.learned_, x)
        return Outputs(logits / self.confidence_.temperature, novelty)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict the probability of each class [Q, N], in the order of `classes_`."""
        result: np.ndarray = softmax(self._evaluate(X).logits, axis=1)
        return result

    def predict(self, X: Any) -> np.ndarray:
        """Predict the most probable class of each image, text or feature vector [Q]."""
        check_is_fitted(self)
        result: np.ndarray = self.classes_[self.predict_proba(X).argmax(1)]
        return result

    def label(self, X: Any) -> list[Label]:
        """Predict the label of each one, with how far to trust it."""
        return self.confidence_.labels(self._evaluate(X), self.classes_.tolist())

    def save(self, folder: str | Path) -> None:
        """Save to a folder: JSON, and arrays without pickle. An interrupted save changes nothing.

        The folder has a copy of what it needs of a run. Raise UserError for a Python function.
        """
        check_is_fitted(self)
        identity = None if self.network is None else self.network.identity
        if self.network is not None and identity is None:
            raise UserError("a classifier on a Python function cannot be saved; name a backbone")
        arrays = {"examples": self.examples_, "targets": self.targets_}
        run = self.run and saved.copy_run(Path(self.run), Path(folder), str(identity))
        content = {
            "settings": self.get_params() | {"run": run},
            "network": identity,
            "classes": self.classes_.tolist(),
            "head": self.head_,
            "scale": self.scale_,
            "normalise": self.normalise_,
            "confidence": dataclasses.asdict(self.confidence_),
            "notes": self.notes_,
        }
        learned = {f"learned.{name}": value for name, value in self.learned_.items()}
        saved.write(Path(folder), content, arrays | learned)

    @classmethod
    def load(cls, folder: str | Path, run: str | Path | None = None) -> "FewShotClassifier":
        """Load a saved classifier; this runs no code from it.

        `run` is the folder of its run, if it is not in `folder`, as earlier versions saved it.
        Raise UserError if it is no classifier, or its network has changed.
        """
        with saved.reading(Path(folder)) as (content, arrays):
            self = cls(**content["settings"])
            if self.run is not None:
                self.run = Path(folder) / self.run if run is None else run
            elif run is not None:
                raise UserError(f"run={run}: the classifier in {folder} does not use a run")
            self.classes_, self.head_ = np.array(content["classes"]), content["head"]
            self.normalise_, self.scale_ = content["normalise"], float(content["scale"])
            self.notes_ = [dict(note) for note in content["notes"]]
            self.confidence_ = Confidence(**content["confidence"])
            self.examples_, self.targets_ = arrays["examples"], arrays["targets"]
            learned = [name for name in arrays if name.startswith("learned.")]
            self.learned_ = {name.partition(".")[2]: arrays[name] for name in learned}
            if not len(self.notes_) == len(self.targets_) == len(self.examples_):
                raise ValueError("numbers of examples differ")
            if self.network is None:
                self.n_features_in_ = self.examples_.shape[1]
            if self._evaluate(self.examples_[:1]).logits.shape != (1, len(self.classes_)):
                raise ValueError("the arrays do not fit the classes")
        if self.network is not None and self.network.identity != content["network"]:
            where = f"run={self.run}" if self.run else f"backbone={self.backbone}"
            raise UserError(
                f"{folder}: {where} has other weights than those the classifier was made with; "
                "make it again from its examples"
            )
        return self
