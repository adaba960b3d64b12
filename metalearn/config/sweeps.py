"""The runs of a sweep that a check must look at: each value of each axis once."""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from metalearn.config.choices import groups
from metalearn.config.composition import apply_overrides, compose_config, hydra_errors, parsed

#: Settings that a grid search varies.
_SEARCHED = ("algo.", "backbone.", "train.", "optimiser.", "loss.", "augment.")


def is_sweep(override: str) -> bool:
    """Return True if an override gives several values."""
    return bool(parsed([override])[0].is_sweep_override())


def key_of(override: str) -> str:
    """Return the key of an override."""
    return override.lstrip("+~").partition("=")[0]


def is_grid_search(axes: list[str]) -> bool:
    """Return True if all axes of a sweep are settings of the method or of its training.

    Other axes, such as `algo`, `dataset`, `episode.shot` or `seed`, make it a comparison.
    """
    return bool(axes) and all(axis.startswith(_SEARCHED) for axis in axes)


def one_run_per_value(overrides: list[str]) -> list[list[str]]:
    """Return runs of a multirun, as plain overrides, that contain each value of each axis.

    The first run has the first value of each axis; each other run differs in one value. Search
    ranges (of sweepers with a strategy) are left out.
    """
    from hydra.core.override_parser.types import Glob

    with hydra_errors(overrides):
        axes: list[list[str]] = []
        for override in parsed(overrides):
            if not override.is_sweep_override():
                axes.append([str(override.input_line)])
            elif override.is_discrete_sweep() and not isinstance(override.value(), Glob):
                key = override.get_key_element()
                axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
    first = [axis[0] for axis in axes]
    others = [
        [*first[:number], value, *first[number + 1 :]]
        for number, axis in enumerate(axes)
        for value in axis[1:]
    ]
    return [first, *others]


def one_config_per_value(overrides: list[str]) -> Iterator[DictConfig]:
    """Yield the configurations of `one_run_per_value`.

    Hydra composes the first one, and those that choose another group or add a key; the others are
    the first one with a changed value, which takes a fraction of the time.
    """
    runs = one_run_per_value(overrides)
    first, known_groups = compose_config(runs[0]), groups()
    yield first
    for run in runs[1:]:
        changed = [word for word, usual in zip(run, runs[0], strict=True) if word != usual]
        keys = [word.partition("=")[0] for word in changed]
        if any(key in known_groups or OmegaConf.select(first, key) is None for key in keys):
            yield compose_config(run)
        else:
            yield apply_overrides(first, changed)
