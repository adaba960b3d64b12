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
    for family, names in families().items():
        print(f"algo=    {_FAMILIES.get(family, family)}")
        for name in names:
            print(f"  {name:<16} {lines[name]}")
    for group in _GROUPS:
        print(f"{group}=")
        for name, line in options(group).items():
            print(f"  {name:<16} {line}")
    return 0
