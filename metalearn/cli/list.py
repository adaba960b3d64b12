"""List algorithms, datasets, backbones and other choices."""

from metalearn.system.errors import UserError

HELP = """metalearn list

Lists algorithms, datasets, backbones, episodes, optimisers, losses, augmentations and experiments,
with one line each.
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = ()

#: Headings of the families of algorithms.
_FAMILIES = {
    "gradient": "gradient-based: adapt weights by gradient steps",
    "metric": "metric: compare with the support set in an embedding",
    "memory": "memory and weights written from the support set",
    "transfer": "transfer baselines: trained on ordinary batches",
}
_GROUPS = ("dataset", "backbone", "episode", "optimiser", "loss", "augment", "experiment")


def main(args: list[str]) -> int:
    """Run the command. Return the exit code."""
    if args:
        raise UserError(f"list {args[0]}: list takes no arguments")
    from metalearn.config.composition import families, options

    lines = options("algo")
    groups = {
        f"algo=    {_FAMILIES.get(family, family)}": {name: lines[name] for name in names}
        for family, names in families().items()
    }
    groups |= {f"{group}=": options(group) for group in _GROUPS}
    width = max(len(name) for choices in groups.values() for name in choices)
    for heading, choices in groups.items():
        print(heading, *(f"  {name:<{width}} {line}" for name, line in choices.items()), sep="\n")
    return 0
