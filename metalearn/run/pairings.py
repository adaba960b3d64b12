"""Check that the settings of a run fit together: method, dataset, backbone and statistics."""

import torch

from metalearn.algorithms.base import Algorithm
from metalearn.algorithms.normalisation import STATISTICS
from metalearn.config import components
from metalearn.config.schema import RunConfig
from metalearn.run import clusters, optimisers, parts
from metalearn.system.errors import UserError, first_line
from metalearn.tasks.augment import AUGMENTATIONS, input_kinds
from metalearn.tasks.mixing import MIXINGS
from metalearn.tasks.types import InputSpec, Query


def check(settings: RunConfig, is_restored: bool = False) -> None:
    """Check all that is known before any data is read; raise UserError for what does not fit.

    An earlier run that `is_restored` may have a precision that is refused for new ones.
    """
    algorithm, episode, train = parts.algorithm_of(settings), settings.episode, settings.train
    target = components.component(settings.dataset, "dataset").target
    name = type(algorithm).__name__
    if target not in algorithm.targets:
        learned = " or ".join(target_name(kind) for kind in algorithm.targets)
        raise UserError(
            f"algo={name} learns {learned}, but this dataset has {target_name(target)}; choose "
            "another algo or dataset"
        )
    if algorithm.fixed_way and isinstance(episode.way, list):
        raise UserError(
            f"episode.way={episode.way}: the number of ways is part of {name}'s weights; use one "
            "number"
        )
    if episode.sampler == "hard":
        raise UserError(
            "episode.sampler=hard: chooses classes by their errors in training, so not in tests; "
            "use episode.train.sampler=hard"
        )
    if episode.train.sampler == "hard" and train.source != "episodes":
        raise UserError(
            f"episode.train.sampler=hard: train.source={train.source} trains on no episodes; leave "
            "it out"
        )
    for where, shape in (("episode", episode), ("episode.train", episode.train)):
        given = {
            "unbalanced": shape.unbalanced, "sampler": shape.sampler != "uniform" and shape.sampler,
            "unlabelled": shape.unlabelled, "dirichlet": shape.dirichlet,
        }  # fmt: skip
        for key, value in given.items() if target != "class" else ():
            if value:
                raise UserError(
                    f"{where}.{key}={str(value).lower()}: this dataset has no classes; leave it out"
                )
        if shape.unbalanced and algorithm.needs_equal_shots:
            raise UserError(
                f"{where}.unbalanced=true: {name} requires as many support examples of each class; "
                "leave it out"
            )
        if shape.distractors and not shape.unlabelled:
            raise UserError(
                f"{where}.distractors={shape.distractors}: distractors are classes with unlabelled "
                f"examples only; set {where}.unlabelled"
            )
    is_trained_alike = train.source != "episodes" or episode.train.way == episode.way
    if algorithm.fixed_way and not is_trained_alike:
        raise UserError(
            f"episode.train.way={episode.train.way} should equal episode.way={episode.way}: "
            f"the number of ways is part of {name}'s weights"
        )
    if train.source not in algorithm.sources:
        raise UserError(
            f"train.source={train.source}: {name} trains on {' or '.join(algorithm.sources)}; use "
            f"train.source={algorithm.sources[0]}"
        )
    if algorithm.backbone.is_external:
        backbone = type(algorithm.backbone).__name__
        if algorithm.backbone.normalises and not algorithm.normalisation.has_population:
            raise UserError(
                f"statistics={settings.statistics}: backbone={backbone} always uses the population "
                "statistics of its weights; use statistics=population"
            )
        if settings.engine.strategy not in ("auto", "loop"):
            raise UserError(
                f"engine.strategy={settings.engine.strategy}: backbone={backbone} is applied to "
                "one task at a time; use engine.strategy=loop"
            )
    if settings.engine.rematerialise and not algorithm.can_rematerialise:
        raise UserError(
            f"engine.rematerialise=true: {name} does not backpropagate through inner steps; "
            "leave it out"
        )
    if settings.engine.rematerialise and settings.engine.precision == "mixed":
        raise UserError(
            "engine.rematerialise=true: engine.precision=mixed would recompute inner steps in "
            "bfloat16; use engine.precision=fp32"
        )
    if settings.engine.precision == "bf16" and algorithm.can_rematerialise and not is_restored:
        raise UserError(
            f"engine.precision=bf16: {name} differentiates through inner steps, which bfloat16 "
            "makes wrong; use engine.precision=mixed or fp32"
        )
    if algorithm.uses_unlabelled and not max(episode.unlabelled, episode.train.unlabelled):
        raise UserError(f"algo={name} learns from unlabelled examples; set episode.unlabelled")
    uses = {"name": algorithm.uses_loss, "inner": algorithm.uses_inner_loss}
    for key, is_used in uses.items():
        if (value := getattr(settings.loss, key)) is not None and not is_used:
            raise UserError(f"loss.{key}={value}: {name} does not use this loss; leave it out")
    optimisers.check(settings.optimiser)
    clusters.check(settings)
    if train.schedule == "milestones" and not train.milestones:
        raise UserError("train.schedule=milestones: set train.milestones, like [0.6,0.8]")
    _check_augment(settings, algorithm, target)
    parts.device_of(settings.device)


def without_effect(settings: RunConfig) -> list[str]:
    """Return a line about each setting that does not do what its name promises."""
    train, lines = settings.train, []
    if train.warmup > train.steps > 0:
        lines.append(
            f"train.warmup={train.warmup}: longer than train.steps={train.steps}, so the learning "
            "rate never reaches train.lr"
        )
    if train.milestones and train.schedule != "milestones":
        lines.append(
            f"train.milestones={train.milestones}: has no effect with "
            f"train.schedule={train.schedule}; use train.schedule=milestones"
        )
    for where, shape in (("episode", settings.episode), ("episode.train", settings.episode.train)):
        if shape.unbalanced and shape.shot in (1, [1, 1]):
            lines.append(
                f"{where}.unbalanced=true: has no effect with one example of each class; use "
                f"{where}.shot=2 or more"
            )
    return lines


def _check_augment(settings: RunConfig, algorithm: Algorithm, target: str) -> None:
    own, name = settings.augment, type(algorithm).__name__
    parts.augmentation_of(settings)
    if (own.ops or own.mix) and target != "class":
        raise UserError(
            f"augment changes inputs of classes, but this dataset has {target_name(target)}; use "
            "augment=none"
        )
    parts.support_augmentation_of(settings, algorithm)
    if algorithm.num_views > 1 and not own.ops:
        raise UserError(
            f"augment=none: {name} learns that differently augmented views of one input belong "
            "together; choose augment=views"
        )
    if not parts.mixing_of(settings):
        return
    if not algorithm.accepts_soft_labels:
        raise UserError(
            f"augment.mix: gives queries several labels, which {name}'s loss cannot use; leave it "
            "out"
        )
    y = torch.full((2, 3), 1 / 3)
    try:
        algorithm.family.query_loss(lambda _, x: (x, {}), {}, Query(y, y), torch.tensor(0))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"augment.mix: gives examples several labels, which loss.name={settings.loss.name} "
            f"cannot use ({first_line(error)})"
        ) from None


def check_inputs(settings: RunConfig, algorithm: Algorithm, inputs: InputSpec) -> None:
    """Raise UserError if the backbone or the augmentation does not accept these inputs."""
    backbone = algorithm.backbone
    if inputs.kind not in backbone.input_kinds:
        raise UserError(
            f"backbone={type(backbone).__name__} takes {' or '.join(backbone.input_kinds)}, but "
            f"this dataset has {inputs.kind}; choose another backbone"
        )
    for part, known in (("ops", AUGMENTATIONS), ("mix", MIXINGS), ("support", AUGMENTATIONS)):
        for op, (function, _) in parts.augment_functions(settings, part).items():
            if part == "support" and not algorithm.support_copies:
                continue
            if inputs.kind not in (kinds := input_kinds(function)):
                fitting = [one for one, own in known.items() if inputs.kind in input_kinds(own)]
                raise UserError(
                    f"augment.{part}.{op}: changes {' or '.join(kinds)}, but this dataset has "
                    f"{inputs.kind}; use augment=none or one of: {', '.join(fitting) or 'none'}"
                )


def check_population(settings: RunConfig, statistics: str) -> None:
    """Raise UserError if a test requires population statistics that a run with settings has not."""
    if STATISTICS[statistics].has_population and not STATISTICS[settings.statistics].has_population:
        raise UserError(
            "statistics=population: this run has no population statistics; train with "
            "statistics=population"
        )


def inductive_statistics(settings: RunConfig) -> str:
    """Return "population" if a trained run has such statistics, else "support"."""
    return settings.statistics if STATISTICS[settings.statistics].has_population else "support"


def inductive_counterpart(settings: RunConfig, statistics: str) -> str:
    """Return the statistics to compare with: the run's inductive ones for "query", else "query"."""
    if not STATISTICS[statistics].is_transductive:
        return "query"
    return inductive_statistics(settings)


def is_transductive(algorithm: Algorithm) -> bool:
    """Return True if a prediction depends on the other queries, by statistics or by the method."""
    by_statistics = algorithm.backbone.normalises and algorithm.normalisation.is_transductive
    return by_statistics or algorithm.is_transductive


def target_name(target: str) -> str:
    """Return the plural name of a target, for messages."""
    return {"class": "classes", "value": "values (regression)"}.get(target, target)
