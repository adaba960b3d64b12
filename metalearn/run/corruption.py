"""Make queries harder to read, to test how much a run relies on clean inputs."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from metalearn.run.build import Run
from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.augment import random_erasing
from metalearn.tasks.ranges import Varied
from metalearn.tasks.sampling import EpisodeSampler
from metalearn.tasks.store import Augmented


def _noise(x: Tensor, key: Tensor, severity: float) -> Tensor:
    """Add normal noise to the pixels, with this standard deviation."""
    return (x + severity * prng.normal(key, tuple(x.shape[1:]))).clamp_(0, 1)


def _occlusion(x: Tensor, key: Tensor, severity: float) -> Tensor:
    """Cover this share of the image by a grey box of random shape and place."""
    return random_erasing(x, key, probability=1.0, area=(severity, severity))


_CORRUPTIONS: dict[str, Callable[..., Tensor]] = {"noise": _noise, "occlusion": _occlusion}


def corrupted(run: Run, name: str, percent: int) -> Run:
    """Return a run whose test queries (and unlabelled images) are corrupted; support sets are not.

    An image has the same random numbers at each severity. `percent` is the standard deviation of
    the "noise" in percent of the range of pixels, or the covered share of the area ("occlusion"); 0
    returns the run as it is. Raise UserError for inputs that are not images with classes, or a
    severity above 100.
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
        store=Augmented(source.store, partial(_CORRUPTIONS[name], severity=percent / 100)),
        support_store=source.support_store or source.store,
    )
    test = dataclasses.replace(varied, source=source) if varied else source
    return dataclasses.replace(
        run, test=test, protocol={**run.protocol, "corrupt": name, "severity": percent / 100}
    )
