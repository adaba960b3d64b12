"""Define the losses that `loss.name` and `loss.inner` choose by name.

To add one, add an entry to `LOSSES` here or in a plugin. Parameters after the first two are its
settings; an annotation such as `Annotated[float, between(0, 1)]` has their bounds.
"""

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.config.fields import at_least, between
from metalearn.tasks.metrics import one_hot

#: (prediction [Q, N], y) -> [], the mean over the examples.
LossFunction = Callable[..., Tensor]


def cross_entropy(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy of logits [Q, N] for labels [Q] or probabilities [Q, N]."""
    return F.cross_entropy(prediction, y)


def label_smoothing(
    prediction: Tensor, y: Tensor, smoothing: Annotated[float, between(0, 1)] = 0.1
) -> Tensor:
    """Compute cross-entropy with smoothed labels (Szegedy et al. 2016, section 7).

    `smoothing` is the probability mass of each target that is spread over all classes.
    """
    return F.cross_entropy(prediction, y, label_smoothing=smoothing)


def focal(prediction: Tensor, y: Tensor, power: Annotated[float, at_least(0)] = 2.0) -> Tensor:
    """Compute the mean of -sum_n y_n (1 - p_n)^power log p_n (Lin et al. 2017, eq. 4).

    A power of 0 is cross-entropy; more gives less weight to well classified examples.
    """
    log_p = F.log_softmax(prediction, -1)
    # 1 - p, without its loss of digits at p = 1, where its power has no finite derivative.
    rest = -torch.expm1(log_p.clamp_max(-1e-7))
    return -(probabilities(y, prediction) * rest.pow(power) * log_p).sum(-1).mean()


def class_weighted(
    prediction: Tensor, y: Tensor, power: Annotated[float, between(0, 1)] = 1.0
) -> Tensor:
    """Compute the weighted mean cross-entropy, with weight count^-power for each class.

    With power 1, each class that occurs has the same total weight; with 0, each example has.
    """
    mass = probabilities(y, prediction)
    mass = mass * mass.sum(0).clamp_min(torch.finfo(mass.dtype).tiny).pow(-power)
    return -(mass * F.log_softmax(prediction, -1)).sum() / mass.sum()


def probabilities(y: Tensor, prediction: Tensor) -> Tensor:
    """Return labels [Q] as probabilities [Q, N], as large as the prediction; others unchanged."""
    return y if y.is_floating_point() else one_hot(y, prediction.shape[-1]).to(prediction.dtype)


def squared_error(prediction: Tensor, y: Tensor) -> Tensor:
    """Compute the mean squared error of values [Q, D] for targets [Q, D]."""
    return F.mse_loss(prediction, y)


#: Losses by kind of target; the first of each kind is its default.
LOSSES: dict[str, dict[str, LossFunction]] = {
    "class": {
        "cross_entropy": cross_entropy, "label_smoothing": label_smoothing, "focal": focal,
        "class_weighted": class_weighted,
    },
    "value": {"squared_error": squared_error},
}  # fmt: skip
