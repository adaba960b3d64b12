"""Datasets: settings that open a dataset and give the tasks of its splits."""
