"""Choose a head by cross-validation, and hold examples out of the whole of learning."""

import dataclasses
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from metalearn.predict import heads
from metalearn.predict.confidence import MANY, HeldOut, Outputs, hold_out, temperature


@dataclasses.dataclass(frozen=True)
class HeadChoice:
    """How a head is chosen and learns; arguments of `FewShotClassifier`, "auto" for the head."""

    head: str
    normalise: str
    cost: float
    seed: int

    def outputs(
        self, head: str, x: np.ndarray, y: np.ndarray, way: int, queries: np.ndarray
    ) -> Outputs:
        """Learn a head from x [M, D] and y [M], and predict queries."""
        learned = heads.learn(head, self.normalise, x, y, way, self.cost)
        return Outputs(heads.logits(head, learned, queries), heads.novelty(learned, queries))

    def choose(self, x: np.ndarray, y: np.ndarray, way: int, fits: int) -> tuple[str, float]:
        """Return `head` and 1, or the best head in cross-validation and its temperature.

        The first head, unless another one is more accurate by at least a standard error (Breiman et
        al. 1984). The temperature gives logits of different heads the same scale.
        """
        if self.head != "auto":
            return self.head, 1.0
        best, required, chosen = -1.0, 0.0, (heads.HEADS[0], 1.0)
        for head in heads.HEADS:
            held_out = hold_out(
                lambda *data, head=head: self.outputs(head, *data), x, y, way, fits, self.seed
            )
            if held_out is None:
                return chosen
            accuracy = float((held_out.logits.argmax(1) == held_out.y).mean())
            if accuracy > max(best, required):
                degree = temperature(held_out.logits, held_out.y, held_out.examples)
                best, chosen = accuracy, (head, degree)
            if head == heads.HEADS[0]:
                error = (accuracy * (1 - accuracy) / held_out.examples) ** 0.5
                required = accuracy + error - 1e-9
        return chosen

    def made(
        self, x: np.ndarray, y: np.ndarray, way: int, is_held_out: bool
    ) -> tuple[str, float, HeldOut | None]:
        """Choose the head, and hold out examples of the whole of learning, its choice included.

        Args: x float64 [M, D], y int64 [M], N; without `is_held_out`, nothing is held out.
        Returns the head, its temperature, and predictions of held-out examples.
        """
        if self.normalise == "l2" and len(x) < x.shape[1]:
            # A rotation to as many features as examples: no head depends on it.
            triangle: Any = np.linalg.qr(heads.scaled({}, x).T, mode="r")
            x = triangle.T
        is_large = len(x) > MANY
        with threadpool_limits(None if is_large else 1):  # threads would only wait for each other
            head, scale = self.choose(x, y, way, 20)

            def learn(x: np.ndarray, y: np.ndarray, way: int, queries: np.ndarray) -> Outputs:
                one, own = (head, scale) if is_large else self.choose(x, y, way, 1)
                outputs = self.outputs(one, x, y, way, queries)
                return Outputs(outputs.logits / own, outputs.novelty)

            fits = 10 if self.head == "auto" else 20
            held_out = hold_out(learn, x, y, way, fits, self.seed) if is_held_out else None
        return head, scale, held_out
