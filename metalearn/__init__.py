"""metalearn: few-shot and meta-learning experiments, with figures that can be trusted."""

__version__ = "0.1.0"
