"""Contract checks for methods, datasets and backbones: this package's own, and those of plugins.

    from metalearn import testing
    testing.check_method("protonet")
    testing.check_method(MyMethod, temperature=0.1)

Each check raises AssertionError with what is wrong. `METHOD_CHECKS`, `DATASET_CHECKS` and
`BACKBONE_CHECKS` are the single checks by name, for parametrised tests. The checks need no files
and no network, and take seconds.
"""

from metalearn.tasks.sampling import Shape
from metalearn.tasks.types import InputSpec
from metalearn.testing.backbones import BACKBONE_CHECKS, BackboneCase, check_backbone
from metalearn.testing.cases import Method
from metalearn.testing.datasets import DATASET_CHECKS, DatasetCase, check_dataset
from metalearn.testing.methods import METHOD_CHECKS, check_method

__all__ = [
    "BACKBONE_CHECKS", "DATASET_CHECKS", "METHOD_CHECKS", "BackboneCase", "DatasetCase",
    "InputSpec", "Method", "Shape", "check_backbone", "check_dataset", "check_method",
]  # fmt: skip
