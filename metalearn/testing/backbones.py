"""Contract checks for backbones."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from metalearn.backbones.base import Backbone
from metalearn.tasks import prng
from metalearn.tasks.types import InputSpec, Params
from metalearn.testing.cases import as_double


@dataclasses.dataclass(frozen=True)
class BackboneCase:
    """A backbone under test, and the kind of its inputs."""

    backbone: Backbone
    inputs: InputSpec

    @functools.cached_property
    def params(self) -> Params:
        """Return initial parameters in float64."""
        return as_double(self.backbone.init(self.inputs, prng.key_of(0))[0])  # type: ignore[no-any-return]

    @functools.cached_property
    def given(self) -> Params | None:
        """Return the population statistics in float64 if only these can be used, else None."""
        population = self.backbone.init(self.inputs, prng.key_of(0))[1]
        return as_double(population) if self.backbone.is_external else None

    @functools.cached_property
    def x(self) -> Tensor:
        """Return 6 random inputs."""
        key = prng.key_of(1)
        if self.inputs.vocabulary is not None:
            return prng.integers(key, (6, *self.inputs.shape), self.inputs.vocabulary)
        return prng.normal(key, (6, *self.inputs.shape)).double()


def initialises_by_its_key(case: BackboneCase) -> None:
    """Initial parameters are a function of the key."""
    first, population = case.backbone.init(case.inputs, prng.key_of(0))
    again, other = (case.backbone.init(case.inputs, prng.key_of(seed))[0] for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    is_given = bool(case.backbone.pretraining([])) or all(
        (value == value.flatten()[0]).all() for value in first.values()
    )
    assert is_given or not all(torch.equal(first[name], other[name]) for name in first)
    assert bool(population) == case.backbone.normalises
    assert (
        not any(name.startswith("conv") and name.endswith("bias") for name in first)
        or not population
    )


def embeds_in_its_shape(case: BackboneCase) -> None:
    """Embeddings are flat, with as many numbers as `shape` says."""
    z, seen = case.backbone.embed(case.params, case.x, case.given)
    assert z.shape == (6, math.prod(case.backbone.shape(case.inputs))) and not seen


def given_statistics_are_used(case: BackboneCase) -> None:
    """With the statistics of a batch, each input is embedded as within that batch."""
    given = case.given
    own, seen = case.backbone.embed(case.params, case.x, given, collect=given is None)
    if given is None:
        assert bool(seen) == case.backbone.normalises
        assert seen.keys() == case.backbone.init(case.inputs, prng.key_of(0))[1].keys()
        given = seen
    torch.testing.assert_close(case.backbone.embed(case.params, case.x[:2], given)[0], own[:2])


def film_scales_and_shifts(case: BackboneCase) -> None:
    """A zero scale and shift after each normalisation change nothing, and get a gradient."""
    if case.backbone.is_external:
        return
    film = as_double(case.backbone.film(case.inputs, torch.device("cpu")))
    plain = case.backbone.embed(case.params, case.x)[0]
    torch.testing.assert_close(case.backbone.embed(case.params, case.x, film=film)[0], plain)

    def loss(film: Params) -> Tensor:
        return case.backbone.embed(case.params, case.x, film=film)[0].square().sum()

    for name, value in torch.func.grad(loss)(film).items():
        assert value.abs().max() > 0, f"{name} gets no gradient"


def maps_over_tasks(case: BackboneCase) -> None:
    """Under `vmap` with per-task parameters, second derivatives are those of single tasks."""
    if case.backbone.is_external:  # it is never mapped
        return
    params = {name: torch.stack([value, 1.1 * value]) for name, value in case.params.items()}
    x = torch.stack([case.x, case.x.flip(0)])

    def second(params: Params, x: Tensor) -> Params:
        def inner(params: Params) -> Tensor:
            return case.backbone.embed(params, x)[0].tanh().square().mean()

        def outer(params: Params) -> Tensor:
            gradient = torch.func.grad(inner)(params)
            return inner({name: value - 0.1 * gradient[name] for name, value in params.items()})

        return torch.func.grad(outer)(params)

    mapped = vmap(second)(params, x)
    for number in range(2):
        alone = second({name: value[number] for name, value in params.items()}, x[number])
        for name, value in alone.items():
            torch.testing.assert_close(mapped[name][number], value, rtol=1e-6, atol=1e-9)


BACKBONE_CHECKS: dict[str, Callable[[BackboneCase], None]] = {
    check.__name__: check
    for check in (
        initialises_by_its_key,
        embeds_in_its_shape,
        given_statistics_are_used,
        film_scales_and_shifts,
        maps_over_tasks,
    )
}


def check_backbone(backbone: Backbone, inputs: InputSpec) -> None:
    """Check that a backbone fulfils the contract of every backbone.

    Args:
        backbone: The network.
        inputs: Its inputs: InputSpec((3, 32, 32)) for images, InputSpec((16,)) for features,
            InputSpec((20,), 1000) for tokens.

    Raises:
        AssertionError: If it violates the contract.
    """
    case = BackboneCase(backbone, inputs)
    for check in BACKBONE_CHECKS.values():
        check(case)
