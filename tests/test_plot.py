"""Plots of a run and of a sweep, corrupted queries, and ensembles."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from sklearn.metrics import roc_auc_score

from metalearn.algorithms.params import select
from metalearn.cli import evaluate as command
from metalearn.cli import plot
from metalearn.config import checking, composition
from metalearn.report.folder import RunFolder
from metalearn.report.scores import read_scores
from metalearn.report.sheets import draw_sheet
from metalearn.run import scoring
from metalearn.run.build import build
from metalearn.run.corruption import corrupted
from metalearn.run.ensemble import evaluate_ensemble
from metalearn.run.evaluate import evaluate
from metalearn.run.figures import KINDS, plot_run
from metalearn.run.inspection import confusion, most_confused, principal_components
from metalearn.run.measure import trained_state
from metalearn.run.request import Request
from metalearn.run.sensitivity import plot_sweep
from metalearn.run.train import train
from metalearn.run.verification import roc
from metalearn.system.errors import UserError


@pytest.fixture
def console():
    return Console(width=160, record=True)


@pytest.fixture
def make(compose, tmp_path):
    def run(name, *overrides):
        composed = compose("episode.way=3", *overrides)
        train(composed, tmp_path / name, f"{name} glyphs", [], Console(quiet=True))
        return tmp_path / name

    return run


def size_of(file):
    with Image.open(file) as image:
        return image.size


def test_confusions_are_counted_among_queries_that_could_be_confused():
    tested = scoring.Tested(
        scores=torch.zeros(2),
        classes=torch.tensor([[0, 0, 1], [0, 2, -1]]),
        predicted=torch.tensor([[0, 1, 0], [2, 2, -1]]),
    )
    counts, queries = confusion(tested, 4)
    assert counts.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    # Class 0 has two queries with class 1, and one with class 2, which class 1 never meets.
    assert queries.tolist() == [[3, 2, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert most_confused(counts, 2) == [0, 1]  # confused in both directions
    assert sorted(most_confused(counts, 9)) == [0, 1, 2]
    assert most_confused(torch.eye(3), 9) == []


def test_principal_components_are_the_directions_of_most_variance():
    along = torch.linspace(-1, 1, 9)
    x = torch.stack([3 * along + 5, 4 * along - 2, 0.5 * along.abs()], 1)
    points, shares = principal_components(x)
    assert torch.allclose(points[:, 0].abs(), 5 * along.abs().double(), atol=1e-6)
    variances = x.double().var(0)
    assert shares[0] == pytest.approx(float(variances[:2].sum() / variances.sum()))
    assert sum(shares) == pytest.approx(1)


def test_plot_prints_one_document(make, capsys, cache_dir):
    folder = make("protonet", "algo=protonet")
    words = [f"run={folder}", "kinds=learning,steps", "--json"]
    assert plot.main(words) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["files"] == [str(folder / "plots/learning.png")]
    assert list(content["left_out"]) == ["steps"]


def test_a_run_is_drawn_with_its_confusions_and_its_worst_episodes(make, console):
    folder = make("protonet", "algo=protonet", "test.episodes=12")
    content = plot_run(folder, [], [], "test", console)
    text = console.export_text()
    assert list(content["left_out"]) == ["steps"] and "left out: steps" in text
    assert [Path(file).stem for file in content["files"]] == [
        one for one in KINDS if one != "steps"
    ]
    assert all(min(size_of(file)) > 200 for file in content["files"])
    scores = read_scores(folder / "test_scores.csv")
    worst = content["worst_episodes"]
    assert [one["accuracy"] for one in worst] == pytest.approx(
        sorted(scores.tolist())[:3], abs=1e-4
    )
    for one in worst:
        assert len(one["wrong"]) == round((1 - one["accuracy"]) * 9)
        assert f"episode {one['episode']}:" in text
        assert all(pair["true"] != pair["predicted"] for pair in one["wrong"])
    assert all(0 < one["queries"] <= one["of"] for one in content["confusions"])
    some = plot_run(folder, ["learning"], ["test.episodes=2"], "val", console)
    assert [Path(file).name for file in some["files"]] == ["learning.png"]
    with pytest.raises(UserError, match="ProtoNet does not adapt in steps"):
        plot_run(folder, ["steps"], [], "test", console)
    with pytest.raises(UserError, match="kinds=all: should be among learning"):
        plot_run(folder, ["all"], [], "test", console)


def test_roc_of_normal_scores_has_the_known_area_and_equal_error_rate():
    generator = torch.Generator().manual_seed(0)
    distance, normal = 2.0, torch.distributions.Normal(0.0, 1.0)
    same = torch.rand(40_000, generator=generator) < 0.2
    score = torch.randn(40_000, generator=generator) + distance * same
    episode = torch.arange(40_000) // 100
    _, *numbers = roc(score, same, episode)
    # Areas under normal densities: P(x > y) and P(x > distance / 2).
    expected = {
        "auc": float(normal.cdf(torch.tensor(distance / 2**0.5))),
        "eer": float(normal.cdf(torch.tensor(-distance / 2))),
    }
    for value, (estimate, low, high) in zip(expected.values(), numbers, strict=True):
        assert estimate == pytest.approx(value, abs=0.006)
        assert low < estimate < high and high - low < 0.02
    rounded = (2 * score).round()  # ties
    area = roc_auc_score(same.numpy(), rounded.numpy())
    assert roc(rounded, same, episode)[1][0] == pytest.approx(area)


@pytest.mark.parametrize("method", ["siamese", "protonet"])
def test_verification_compares_each_query_with_each_support_example(make, console, method):
    folder = make("run", f"algo={method}", "episode.shot=2", "dataset.jitter=0.1")
    content = plot_run(folder, ["verification"], ["test.episodes=5"], "test", console)
    facts = content["verification"]
    with open(facts["scores"]) as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == facts["pairs"] == 5 * (3 * 3) * (3 * 2)  # episodes, queries, support
    assert all((row["query"] == row["support"]) == (row["same"] == "1") for row in rows)
    assert sum(row["same"] == "1" for row in rows) == len(rows) // 3
    low, high = facts["equal_error_rate_ci95"]
    assert 0 <= low <= facts["equal_error_rate"] <= high < 0.5  # 0.5: chance
    assert size_of(content["files"][0])[0] > 200
    request = Request.of(folder, [], "test")
    run = request.run(request.statistics[0])
    state, task = trained_state(run, folder), run.test.draw(0, 1)
    net, population = select(state.params, "net"), select(state.buffers, "net")
    x = torch.cat([task.query.x[0][:1], task.support.x[0][:1]])
    z = run.algorithm.backbone.embed(net, x, given=population)[0]
    expected = torch.nn.functional.cosine_similarity(z[:1], z[1:])
    if method == "siamese":
        pair = {name: state.params[f"pair.{name}"] for name in ("alpha", "bias")}
        expected = (z[0] - z[1]).abs() @ pair["alpha"] + pair["bias"]
    assert float(rows[0]["score"]) == pytest.approx(float(expected), abs=1e-4)


def test_a_regression_has_curves_only(compose, console, tmp_path):
    words = ["dataset=sinusoid", "algo=maml", "train.steps=2", "val.episodes=4", "test.episodes=4"]
    train(compose_plain(compose, words), tmp_path / "a", "maml sinusoid", [], Console(quiet=True))
    content = plot_run(tmp_path / "a", [], [], "test", console)
    assert [Path(file).stem for file in content["files"]] == ["learning", "steps"]
    assert set(content["left_out"].values()) == {"the tasks of this run have no classes"}


def compose_plain(compose, words):
    cache = compose().cache_dir
    return composition.compose_config([f"cache_dir={cache}", "logger=none", *words])


def test_the_worst_episodes_of_texts_are_printed(compose, console, tmp_path):
    # Labels have nothing to do with the texts, so most predictions are wrong.
    label_of = {f"number {number}": f"label{number % 12}" for number in range(96)}
    lines = [f"{text},{label}" for text, label in label_of.items()]
    (tmp_path / "a.csv").write_text("\n".join(["text,label", *lines]))
    words = [
        "algo=protonet", "dataset=text", f"dataset.path={tmp_path}/a.csv", "train.steps=0",
        "backbone=bag_of_ngrams", "episode.way=2", "episode.train.way=2", "episode.query=2",
        "val.episodes=4", "test.episodes=4",
    ]  # fmt: skip
    train(compose_plain(compose, words), tmp_path / "a", "protonet text", [], Console(quiet=True))
    content = plot_run(tmp_path / "a", ["worst"], [], "test", console)
    assert content["left_out"] == {"worst": "their inputs are not images; they are printed"}
    wrong = [one for episode in content["worst_episodes"] for one in episode["wrong"]]
    assert wrong and repr(wrong[0]["text"]) in console.export_text()
    for one in wrong:
        assert label_of[one["text"]] == one["true"] != one["predicted"]


def test_a_wrong_prediction_is_framed_red_and_a_right_one_green(tmp_path):
    rows = [("worst", []), ("a", [[torch.ones(1, 8, 8)], [torch.ones(1, 8, 8)] * 2])]
    draw_sheet(tmp_path / "a.png", "title", rows, ["support", "queries"], False, [[], ["7", ""]])
    with Image.open(tmp_path / "a.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(10_000)}
    assert {(0xCC, 0x22, 0x22), (0x22, 0xAA, 0x22)} <= colours


def test_a_sweep_is_drawn_over_two_of_its_settings(make, console, tmp_path):
    one = make("run", "algo=protonet")
    sweep = tmp_path / "sweep"
    expected: dict[tuple[float, float], list[float]] = {}
    for number, (lr, temperature, seed) in enumerate(
        [(0.1, 1.0, 0), (0.1, 1.0, 1), (0.1, 10.0, 0), (0.02, 1.0, 0)]
    ):
        folder = sweep / str(number)
        shutil.copytree(one, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["train"]["lr"], config["algo"]["temperature"] = lr, temperature
        config["seed"] = seed
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        result = json.loads((folder / "result.json").read_text())
        result["val"]["accuracy"]["mean"] = score = 0.2 * number
        (folder / "result.json").write_text(json.dumps(result))
        expected.setdefault((temperature, lr), []).append(score)
    content = plot_sweep(sweep, ["algo.temperature", "train.lr"], console)
    assert size_of(content["files"][0])[0] > 200
    points = {(one["algo.temperature"], one["train.lr"]): one for one in content["points"]}
    assert points.keys() == expected.keys()
    for pair, scores in expected.items():
        assert points[pair]["accuracy"] == pytest.approx(sum(scores) / len(scores))
        assert points[pair]["runs"] == len(scores)
    assert plot_sweep(sweep, [], console)["points"]
    shutil.copytree(make("other", "algo=maml"), sweep / "other")
    with pytest.raises(UserError, match=r"these differ: .* and \d+ more; choose two") as caught:
        plot_sweep(sweep, [], console)
    assert len(str(caught.value)) < 600
    with pytest.raises(UserError, match="two settings that differ between the runs"):
        plot_sweep(sweep, ["train.lr", "train.steps"], console)
    for words, message in (
        ([str(sweep), "kinds=worst"], "kinds=worst: belongs to a run"),
        ([str(one), "settings=seed"], "settings=: belongs to a multirun folder"),
        ([str(tmp_path / "nothing")], "there is no such folder"),
        ([str(one), "split=all"], "split=all: should be train, val or test"),
        ([], "plot: takes the folder of a run"),
    ):
        with pytest.raises(UserError, match=message):
            plot.main(words)
    with pytest.raises(UserError, match="no finished run"):
        plot_sweep(tmp_path / "empty", [], console)


def test_only_queries_are_corrupted_by_a_known_amount(make_run, compose):
    run = make_run("algo=protonet", "dataset.image_size=20")
    clean = run.test.draw(0, 3)
    scale = float(torch.tensor(run.data.standardisation.get("scale", [1.0])).flatten()[0])
    noisy = corrupted(run, "noise", 50).test.draw(0, 3)
    covered = corrupted(run, "occlusion", 25).test.draw(0, 3)
    for task in (noisy, covered):
        assert torch.equal(task.support.x, clean.support.x)
        assert torch.equal(task.query.y, clean.query.y)
    assert ((covered.query.x != clean.query.x).float().mean() - 0.25).abs() < 0.04
    middle = (noisy.query.x - clean.query.x) / scale
    assert 0.2 < middle.std() < 0.5  # less than 0.5, because pixels stay between 0 and 1
    assert corrupted(run, "noise", 0) is run
    with pytest.raises(UserError, match="at=101: a severity"):
        corrupted(run, "noise", 101)
    assert corrupted(run, "noise", 50).protocol_id != run.protocol_id
    words = ["algo=protonet", "dataset=gaussians", "backbone=mlp"]
    features = build(checking.check_config(compose_plain(compose, words)))
    with pytest.raises(UserError, match="corrupt=noise: applies to images"):
        corrupted(features, "noise", 0)


def test_a_severity_curve_starts_at_the_result_of_the_run(make, console):
    folder = make("protonet", "algo=protonet")
    content = evaluate(folder, [], "test", None, console, "0,60", "occlusion")
    own = json.loads((folder / "result.json").read_text())
    clean, covered = content["points"]
    assert clean["protocol_id"] == own["protocol_id"] != covered["protocol_id"]
    assert clean["mean"] == pytest.approx(own["test"]["accuracy"]["mean"])
    with pytest.raises(UserError, match="corrupt=rain: should be one of noise, occlusion"):
        evaluate(folder, [], "test", None, console, None, "rain")
    with pytest.raises(UserError, match="corrupt=noise: has a curve of its own"):
        evaluate(folder, [], "test", "shot", console, None, "noise")


def mean_prediction(members):
    """Return the accuracy of the mean probabilities of (run folder, checkpoint or None)."""
    total: torch.Tensor | None = None
    for folder, file in members:
        request = Request.of(folder, [], "test")
        run = request.run(request.statistics[0])
        tasks = run.test.draw(0, 6)
        state = trained_state(run, folder, file)
        probabilities = run.test_engine.predictions(state, tasks).softmax(-1)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return (total.argmax(-1) == tasks.query.y).float().mean()


def test_an_ensemble_of_one_run_has_the_checkpoints_that_it_kept(make, console):
    words = ["algo=protonet", "train.steps=5", "train.lr=0.01", "val.every=1"]
    folder = make("kept", *words, "checkpoint.keep=3")
    kept = RunFolder(folder).all_kept()
    assert len(kept) == 3
    (result,) = evaluate_ensemble([folder], [], "test", console)["results"]
    expected = mean_prediction([(folder, file) for file in kept])
    assert result["test"]["accuracy"]["mean"] == pytest.approx(float(expected), abs=1e-6)
    assert result["ensemble"] == [str(file) for file in kept]


def test_an_ensemble_predicts_by_the_mean_probability(make, console):
    folders = [make(f"run{seed}", "algo=protonet", f"seed={seed}") for seed in (1, 2)]
    content = evaluate_ensemble(folders, [], "test", console)
    expected = mean_prediction([(folder, None) for folder in folders])
    (result,) = content["results"]
    assert result["test"]["accuracy"]["mean"] == pytest.approx(float(expected), abs=1e-6)
    assert result["ensemble"] == [str(folder) for folder in folders]
    assert "ensemble of 2" in console.export_text()
    twice = evaluate_ensemble([folders[0]] * 2, [], "test", console)["results"][0]
    own = json.loads((folders[0] / "result.json").read_text())
    assert twice["test"]["accuracy"]["mean"] == pytest.approx(own["test"]["accuracy"]["mean"])

    other = make("other", "algo=protonet", "episode.shot=2")
    with pytest.raises(UserError, match=r"different protocol than .*run1 \(shot\)"):
        evaluate_ensemble([folders[0], other], [], "test", console)
    with pytest.raises(UserError, match=r"ensemble=true: .* has one checkpoint; name several"):
        command.main([str(folders[0]), "ensemble=true"])
    with pytest.raises(UserError, match="corrupt: takes one run and one dataset"):
        command.main([*map(str, folders), "corrupt=noise"])
