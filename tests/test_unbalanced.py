"""Query sets with random numbers of examples of each class."""

import numpy as np
import pytest
import torch

from metalearn.system.errors import UserError
from metalearn.tasks import prng
from metalearn.tasks.sampling import Shape
from metalearn.tasks.unbalanced import query_counts
from tests.test_episodes import class_and_image, numbered_data


@pytest.mark.parametrize("concentration", [1, 2, 5])
def test_counts_follow_a_rounded_dirichlet_distribution(concentration):
    keys = prng.fold_in(prng.key_of(0), torch.arange(20_000))
    counts = query_counts(keys, 5, 75, concentration)
    assert (counts.sum(1) == 75).all() and counts.min() >= 0
    share = counts.double().numpy() / 75
    expected = np.random.default_rng(0).dirichlet([concentration] * 5, 20_000)
    quantiles = np.linspace(0.05, 0.95, 10)
    for column in range(5):
        found, other = (np.quantile(one[:, column], quantiles) for one in (share, expected))
        np.testing.assert_allclose(found, other, atol=0.015)
    np.testing.assert_allclose(np.cov(share.T), np.cov(expected.T), atol=2e-3)


def test_unbalanced_queries_are_new_images_and_leave_classes_and_support_unchanged():
    data = numbered_data({"train": [20] * 6, "val": [4] * 5, "test": [4] * 5})
    shape = Shape(3, 2, 4, unlabelled=2, dirichlet=2)
    task = data.episodes("train", shape, 0).draw(0, 40)
    plain = data.episodes("train", Shape(3, 2, 4, unlabelled=2), 0).draw(0, 40)
    assert torch.equal(task.support.x, plain.support.x)
    counts = torch.stack([y.bincount(minlength=3) for y in task.query.y])
    assert (counts.sum(1) == 12).all() and counts.double().std() > 1
    assert torch.equal(task.query.x[3:5], data.episodes("train", shape, 0).draw(3, 2).query.x)
    assert task.support.unlabelled is not None
    for t in range(40):
        own = class_and_image(task.support.x[t])[:, 0]
        classes = dict(zip(task.support.y[t].tolist(), own, strict=True))
        images = [
            tuple(row)
            for x in (task.support.x[t], task.query.x[t], task.support.unlabelled[t])
            for row in class_and_image(x).tolist()
        ]
        assert len(set(images)) == 6 + 12 + 6
        owners = class_and_image(task.query.x[t])[:, 0]
        assert owners.tolist() == [classes[y] for y in task.query.y[t].tolist()]
    first = task.query.y[:, 0]
    assert len(first.unique()) == 3  # queries are not ordered by class


def test_too_many_queries_of_one_class_are_refused():
    data = numbered_data({"train": [9] * 5, "val": [9] * 5, "test": [9] * 5})
    with pytest.raises(UserError, match=r"may have 10 examples of one class.*lower episode\.query"):
        data.episodes("train", Shape(3, 1, 3, dirichlet=2), 0)
