"""Make queries harder to read, to test how much a run relies on clean inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from metalearn.run.build import Run
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.augment import random_erasing
from metalearn.tasks.ranges import Varied
from metalearn.tasks.sampling import EpisodeSampler
from metalearn.tasks.store import Augmentation, Augmented


def _noise(severity: float) -> Augmentation:
    """Add normal noise to the pixels, with this standard deviation."""

    def change(x: Tensor, key: Tensor) -> Tensor:
        return (x + severity * prng.normal(key, tuple(x.shape[1:]))).clamp_(0, 1)

    return change


def _occlusion(severity: float) -> Augmentation:
    """Cover this share of the image by a grey box of random shape and place."""

    def change(x: Tensor, key: Tensor) -> Tensor:
        return random_erasing(x, key, probability=1.0, area=(severity, severity))

    return change


_CORRUPTIONS: dict[str, Callable[[float], Augmentation]] = {
    "noise": _noise,
    "occlusion": _occlusion,
}


def corrupted(run: Run, name: str, percent: int) -> Run:
    """Return a run whose test queries (and unlabelled images) are corrupted; support sets are not.

    An image has the same random numbers at each severity.

    Args:
        run: The run.
        name: "noise" or "occlusion".
        percent: Standard deviation of the noise in percent of the range of pixels, or the covered
            share of the area. 0 returns the run as it is.

    Raises:
        UserError: If the inputs are not images with classes, or the severity is above 100.
    """
    if percent > 100:
        raise UserError(f"at={percent}: a severity of {name} is a percentage, at most 100")
    varied = run.test if isinstance(run.test, Varied) else None
    source: Any = varied.source if varied else run.test
    if not isinstance(source, EpisodeSampler) or run.data.inputs.kind != "images":
        raise UserError(f"corrupt={name}: applies to images with classes")
    if percent == 0:
        return run
    source = dataclasses.replace(
        source,
        store=Augmented(source.store, _CORRUPTIONS[name](percent / 100)),
        support_store=source.support_store or source.store,
    )
    test = dataclasses.replace(varied, source=source) if varied else source
    return dataclasses.replace(
        run, test=test, protocol={**run.protocol, "corrupt": name, "severity": percent / 100}
    )
