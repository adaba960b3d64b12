"""Define the losses that `loss.name` and `loss.inner` choose by name.

To add one, add an entry to `LOSSES` here or in a plugin. Parameters after the first two are its
settings; an annotation such as `Annotated[float, between(0, 1)]` has their bounds.
"""

from collections.abc import Callable
from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from metalearn.config.fields import between

#: (prediction [Q, N], y) -> [], the mean over the examples.
LossFunction = Callable[..., Tensor]


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits [Q, N] for labels [Q] or probabilities [Q, N]."""
    return F.cross_entropy(prediction, y)


def label_smoothing(
    prediction: Tensor, y: Tensor, smoothing: Annotated[float, between(0, 1)] = 0.1
) -> Tensor:
    """Compute cross-entropy with smoothed labels (Szegedy et al. 2016, section 7).

    Args:
        prediction: Logits [Q, N].
        y: Labels [Q].
        smoothing: Probability mass of each target that is spread over all classes.
    """
    return F.cross_entropy(prediction, y, label_smoothing=smoothing)


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error of values [Q, D] for targets [Q, D]."""
    return F.mse_loss(prediction, y)


#: Losses by kind of target; the first of each kind is its default.
LOSSES: dict[str, dict[str, LossFunction]] = {
    "class": {"cross_entropy": cross_entropy, "label_smoothing": label_smoothing},
    "value": {"squared_error": squared_error},
}
