"""Loggers: several at once, resumed without gaps, and the old form of their settings."""

import csv
import json

import pytest
import yaml
from omegaconf import OmegaConf

from metalearn.config import checking, composition
from metalearn.report import loggers
from tests.fixtures import SMALL

_TRAIN = [word for word in SMALL if word != "logger=none"]


def rows_of_csv(folder):
    with (folder / "metrics.csv").open() as stream:
        return [
            {key: float(value) for key, value in row.items() if value}
            for row in csv.DictReader(stream)
        ]


@pytest.mark.parametrize("stop", [False, True])
def test_csv_has_the_rows_of_metrics_jsonl_also_after_an_interruption(tmp_path, stop):
    rows = [{"step": 1, "a": 0.5}, {"step": 2, "a": 0.25, "b": 3.0}, {"step": 3, "a": 0.125}]
    logger = loggers.Csv(folder=tmp_path, rows=[])
    for row in rows:
        logger.log(row)
        if stop and row["step"] == 2:  # killed after step 2, resumed from step 1
            logger = loggers.Csv(folder=tmp_path, rows=rows[:1])
            logger.log(rows[1])
    assert rows_of_csv(tmp_path) == rows


def test_tensorboard_reads_back_what_was_logged_after_an_interruption(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = loggers.TensorBoard(folder=tmp_path, rows=[])
    logger.log({"step": 1, "train.loss": 2.0})
    logger.log({"step": 2, "train.loss": 9.0})
    logger.close(failed=True)
    again = loggers.TensorBoard(folder=tmp_path, rows=[{"step": 1, "train.loss": 2.0}])
    again.log({"step": 2, "train.loss": 1.0})
    again.close(failed=False)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 2.0), (2, 1.0)]


def test_a_run_sends_its_rows_to_several_loggers(metalearn, tmp_path):
    pytest.importorskip("tensorboard")
    words = [*_TRAIN, "algo=protonet", "logger=[csv,tensorboard]", "hydra.run.dir=run"]
    assert metalearn("train", *words).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows_of_csv(tmp_path / "run") == rows
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_settings_of_older_runs_and_commands_still_load():
    old = yaml.safe_load(OmegaConf.to_yaml(composition.compose_config([])))
    old["logger"] = {"name": "wandb", "project": "mine", "entity": None}
    settings = checking.check_config(OmegaConf.create(old))
    assert settings.logger == {
        "wandb": {
            "_target_": "metalearn.report.wandb_run.WandbRun", "project": "mine", "entity": None,
        }
    }  # fmt: skip
    for words in (["logger.project=mine"], ["logger=[wandb,csv]", "logger.wandb.project=mine"]):
        config = checking.check_config(composition.compose_config(words))
        assert config.logger["wandb"]["project"] == "mine"
    old["logger"] = {"name": "none", "project": None, "entity": None}
    assert checking.check_config(OmegaConf.create(old)).logger == {}
    assert checking.check_config(composition.compose_config(["logger.name=none"])).logger == {}


def test_only_own_classes_and_those_of_plugins_are_loggers(metalearn):
    for target in ("os.system", "metalearn.report.stats.estimate", "other.Logger"):
        done = metalearn("train", "algo=maml", "logger=csv", f"logger.csv._target_={target}")
        assert done.returncode == 2 and "logger.csv._target_" in done.stderr
