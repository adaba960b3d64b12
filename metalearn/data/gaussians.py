"""Gaussian classes in a feature space: for tests, and a minimal dataset without images."""

import dataclasses
import hashlib
from pathlib import Path

import torch

from metalearn.config.fields import at_least, setting
from metalearn.data.base import Dataset
from metalearn.data.class_splits import random_split
from metalearn.data.classes import ClassData, class_indices
from metalearn.tasks import prng
from metalearn.tasks.store import ArrayStore, ClassView


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussians(Dataset):
    """Feature vectors x = A [c + noise_std e, nuisance_std n], with A orthogonal.

    The class mean c and the noise e have `informative` dimensions; n has the other
    `features - informative`. c, e and n are standard normal. A network that learns to ignore n
    separates new classes much better.
    """

    num_classes: int = at_least(3)
    examples: int = at_least(2)
    features: int = at_least(2)
    informative: int = at_least(1)
    noise_std: float = at_least(0)
    nuisance_std: float = at_least(0)
    data_seed: int = setting()
    split_seed: int = setting()
    fractions: list[float] = at_least(0)

    def open(self, data_dir: Path, cache_dir: Path, device: torch.device) -> ClassData:
        key = prng.key_of(self.data_seed)
        means = prng.normal(prng.fold_in(key, 0), (self.num_classes, 1, self.informative))
        size = (self.num_classes, self.examples, self.features)
        noise = prng.normal(prng.fold_in(key, 1), size)
        signal = means + self.noise_std * noise[..., : self.informative]
        nuisance = self.nuisance_std * noise[..., self.informative :]
        square = prng.normal(prng.fold_in(key, 2), (self.features,) * 2)
        rotation = torch.linalg.qr(square.double())[0]
        x = (torch.cat([signal, nuisance], -1).double() @ rotation.T).float().flatten(0, 1)

        names = [f"class{number:04}" for number in range(self.num_classes)]
        splits = random_split(names, self.fractions, self.split_seed)
        indices = class_indices(names, [self.examples] * len(names), splits, device)
        views = {split: ClassView(index) for split, index in indices.items()}
        content_hash = hashlib.sha256(repr(self).encode()).hexdigest()[:16]
        return ClassData(dict.fromkeys(views, ArrayStore(x.to(device))), views, content_hash)
