"""Random numbers depend on their key alone."""

import torch
from torch.func import vmap

from metalearn.tasks import prng


def test_batched_keys_equal_single_keys():
    keys = prng.fold_in(prng.key_of(3), torch.arange(5))
    singly = torch.stack([prng.uniform(key, (4, 2)) for key in keys])
    assert torch.equal(prng.uniform(keys, (4, 2)), singly)
    assert torch.equal(vmap(lambda key: prng.normal(key, (7,)))(keys), prng.normal(keys, (7,)))


def test_uniform_and_normal_have_the_expected_moments():
    u = prng.uniform(prng.key_of(0), (200_000,)).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.003
    assert abs(u.var() - 1 / 12) < 0.001
    z = prng.normal(prng.key_of(0), (200_000,)).double()
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    assert abs((z**3).mean()) < 0.03


def test_neighbouring_keys_are_uncorrelated():
    keys = prng.fold_in(prng.key_of(0), torch.arange(300))
    u = prng.uniform(keys, (2000,)).double()
    correlation = torch.corrcoef(u) - torch.eye(300)
    assert correlation.abs().max() < 0.13  # 5.8 standard errors of 1/sqrt(2000), 45,000 pairs
    successive = torch.corrcoef(torch.stack([u[:, 1:].flatten(), u[:, :-1].flatten()]))[0, 1]
    assert abs(successive) < 0.005


def test_permutations_are_valid_and_uniform():
    order = prng.permutation(prng.fold_in(prng.key_of(1), torch.arange(6000)), 5)
    assert torch.equal(order.sort(-1).values, torch.arange(5).expand(6000, 5))
    counts = torch.stack([(order == value).sum(0) for value in range(5)]).double()
    assert (counts - 1200).abs().max() < 5 * (6000 * 0.2 * 0.8) ** 0.5


def test_key_depends_on_the_order_and_number_of_its_parts():
    parts = [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (2**40,)]
    assert len({prng.key_of(*part).item() for part in parts}) == len(parts)
