"""Import and prepare once what all forked commands of the tests need."""

import hydra  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import rich.progress  # noqa: F401
import scipy.special  # noqa: F401
import sklearn.linear_model
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
import torchvision  # noqa: F401

import metalearn.cli._launch
import metalearn.cli.compare
import metalearn.cli.doctor
import metalearn.cli.evaluate
import metalearn.cli.main
import metalearn.cli.plot
import metalearn.cli.predict
import metalearn.cli.reproduce
import metalearn.cli.train
import metalearn.predict.classifier
import metalearn.predict.report
import metalearn.run.evaluate
import metalearn.run.train
import metalearn.run.verification  # noqa: F401
from metalearn.config import composition, plugins

composition.compose_config([])  # Hydra finds its plugins and prepares its parsers
plugins.installed.cache_clear()  # a command may find more on its path
