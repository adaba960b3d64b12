"""What the forked commands of the tests import, once for all of them."""

import hydra  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import rich.progress  # noqa: F401
import scipy.special  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
import torchvision  # noqa: F401

import metalearn.cli
import metalearn.verbs.compare
import metalearn.verbs.doctor
import metalearn.verbs.evaluate
import metalearn.verbs.reproduce
import metalearn.verbs.train  # noqa: F401
