"""The protocol of a run's test: everything that the measurement depends on."""

from typing import Any

from metalearn.algorithms.base import Algorithm
from metalearn.config.schema import RunConfig
from metalearn.data.base import OpenDataset
from metalearn.data.classes import ClassData
from metalearn.report.result import hash_of
from metalearn.run.pairings import is_transductive
from metalearn.tasks.sampling import SAMPLER_VERSION

#: Settings of test episodes that are part of the protocol if they are set.
_UNUSUAL = ("unbalanced", "unlabelled", "distractors", "dirichlet")


def protocol_of(
    settings: RunConfig, data: OpenDataset, algorithm: Algorithm, split: str
) -> dict[str, Any]:
    """Return the protocol of a test on a split, as plain data."""
    episode = settings.episode
    protocol = {
        **data.protocol(split),
        **{key: getattr(episode, key) for key in ("way", "shot", "query")},
        **{key: getattr(episode, key) for key in _UNUSUAL if getattr(episode, key)},
    }
    if episode.sampler != "uniform":
        assert isinstance(data, ClassData)
        names = repr(data.views[split].index.superclasses)
        protocol |= {"class_sampler": episode.sampler, "superclasses": hash_of({"names": names})}
    if copies := algorithm.support_copies:
        protocol |= {"support_copies": copies, "augment": settings.augment.support}
    return protocol | {
        "statistics": settings.statistics if algorithm.backbone.normalises else "none",
        "transductive": is_transductive(algorithm),
        "sampler": SAMPLER_VERSION,
        "episodes": settings.test.episodes,
        "episode_seed": settings.episode_seed,
    }
