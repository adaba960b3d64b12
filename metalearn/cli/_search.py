"""Search settings: sweeps whose trials are compared on validation."""

import contextlib
from typing import Any

from omegaconf import OmegaConf

from metalearn.config import checking, composition, roles, sweeps
from metalearn.system.errors import UserError


def sampling(config: Any, overrides: list[str]) -> list[str]:
    """Return settings of a sweeper that samples: the metric's direction, and a seed.

    With a seed, a repeated search proposes the same trials. One with a storage continues instead.
    """
    sweeper, more = config.hydra.sweeper, []
    if "direction" in sweeper and "hydra.sweeper.direction=" not in " ".join(overrides):
        is_maximum = worst_score(composition.without_hydra(config)) < 0
        more.append(f"hydra.sweeper.direction={'maximize' if is_maximum else 'minimize'}")
    has_seed = sweeper.get("storage") or sweeper.get("sampler", {}).get("seed", 0) is not None
    if not has_seed:
        more.append("hydra.sweeper.sampler.seed=0")
    return more


def worst_score(config: Any) -> float:
    """Return the score of a failed trial: minus infinity if a higher score is better."""
    from metalearn.run.parts import family_of

    try:
        metric = family_of(checking.check_config(config)).metric
    except UserError:
        return float("-inf")
    return float("-inf") if metric.higher_is_better else float("inf")


def trial_folder(files: Any, overrides: list[str], config: Any) -> Any:
    """Return the folder of an earlier trial with the same settings, else one without a trial.

    So a repeated search resumes a trial that now has another number, as in a larger grid. `files`
    is the folder that Hydra made.
    """
    plain: Any = OmegaConf.to_container(config)
    described = roles.roles(checking.complete(plain, is_strict=False), is_strict=False)

    def essential(words: list[str]) -> set[str]:
        return {word for word in words if not roles.may_resume_with(sweeps.key_of(word), described)}

    for path in sorted(files.path.parent.iterdir()):
        trial = type(files)(path)
        words = trial.read_command()["overrides"] if trial.command.exists() else []
        if words and essential(words) == essential(overrides):
            with contextlib.suppress(OSError):  # the empty one that Hydra made
                files.path.rmdir()
            return trial
    while files.command.exists():
        files = type(files)(files.path.with_name(f"{files.path.name}-b"))
    files.path.mkdir(exist_ok=True)
    return files
