"""Import once what all forked commands of the tests need."""

import hydra  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import rich.progress  # noqa: F401
import scipy.special  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
import torchvision  # noqa: F401

import metalearn.cli.compare
import metalearn.cli.doctor
import metalearn.cli.main
import metalearn.cli.reproduce
import metalearn.run.evaluate
import metalearn.run.train  # noqa: F401
