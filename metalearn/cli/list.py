"""List algorithms, datasets, backbones and other choices, and trained models."""

import itertools
import json
from pathlib import Path

from metalearn.system.errors import UserError

HELP = """metalearn list [--json]

Lists algorithms, datasets, backbones, episodes, optimisers, losses, augmentations, loggers,
experiments and trained models (of the installation, and in ./models), with one line each. --json
prints one JSON document: group -> name -> description, and the family of an algorithm.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ("--json",)

#: Headings of the families of algorithms.
_FAMILIES = {
    "gradient": "gradient-based: adapt weights by gradient steps",
    "metric": "metric: compare with the support set in an embedding",
    "closed_form": "closed form: solve for a classifier, and differentiate the solution",
    "transductive": "transductive: classify all queries of a task together",
    "memory": "memory and sequence: read the support set, or write weights from it",
    "generative": "generative: generate features from the support set",
    "unsupervised": "unsupervised: trained without labels",
    "transfer": "transfer: trained on ordinary batches",
}
_GROUPS = (
    "dataset", "backbone", "episode", "optimiser", "loss", "augment", "logger", "experiment",
)  # fmt: skip


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    if words := [word for word in args if word != "--json"]:
        raise UserError(f"list {words[0]}: list takes no arguments except --json")
    from metalearn.config.choices import families, options

    choices = {
        group: {name: {"description": line} for name, line in options(group).items()}
        for group in ("algo", *_GROUPS)
    }
    headings = {f"{group}=": list(choices[group]) for group in _GROUPS}
    for family, names in reversed(families().items()):
        headings = {f"algo=    {_FAMILIES.get(family, family)}": names, **headings}
        for name in names:
            choices["algo"][name]["family"] = family
    models = _models()
    if "--json" in args:
        print(json.dumps(choices | {"run": models}, indent=2))
        return 0
    width = max(map(len, itertools.chain(*choices.values())))
    choices["run"] = models
    headings |= {"run=     trained models": list(models)} if models else {}
    for heading, names in headings.items():
        group = choices[heading.partition("=")[0]]
        wide = max(width, *map(len, names))
        lines = (f"  {name:<{wide}} {group[name]['description']}" for name in names)
        print(heading, *lines, sep="\n")
    return 0


def _models() -> dict[str, dict[str, str]]:
    """Return the folders of trained models, with the first line of their cards."""
    from metalearn.config.components import conf_dir

    here, found = Path.cwd(), {}
    for folder in (conf_dir().parent / "models", here / "models"):
        for card in sorted(folder.glob("*/README.md")):
            model = card.parent.resolve()
            name = model.relative_to(here) if model.is_relative_to(here) else model
            line = card.read_text(encoding="utf-8").partition("\n")[0]
            found[str(name)] = {"description": line.lstrip("# ")}
    return found
