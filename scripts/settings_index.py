"""Write metalearn/config/settings_index.json: the settings of every method, dataset and backbone, to be read without importing torch.

python scripts/settings_index.py [check]

With `check` it writes nothing, and fails where the file is not that of the code.
"""

import dataclasses
import importlib
import json
import pkgutil
import sys

from metalearn.config import components

_HOMES = {"algorithms": "adapt", "data": "open", "backbones": "embed"}


def index() -> dict[str, list[dict[str, object]]]:
    """Return the settings of each class, by its `_target_`."""
    found = {}
    for home, method in _HOMES.items():
        package = importlib.import_module(f"metalearn.{home}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, cls in vars(importlib.import_module(module.name)).items():
                if not isinstance(cls, type) or cls.__module__ != module.name:
                    continue
                if dataclasses.is_dataclass(cls) and hasattr(cls, method):
                    settings = [components.to_plain(one) for one in components.settings_of(cls)]
                    found[f"{module.name}.{name}"] = settings
    return dict(sorted(found.items()))


def text() -> str:
    """Return the content of the file: a line for each setting."""
    parts = []
    for target, settings in index().items():
        lines = ",\n  ".join(json.dumps(one) for one in settings)
        parts.append(f'"{target}": [\n  {lines}\n]' if lines else f'"{target}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        if components.INDEX_FILE.read_text() != text():
            sys.exit(
                f"{components.INDEX_FILE.name} is out of date; run: python scripts/settings_index.py"
            )
    else:
        components.INDEX_FILE.write_text(text())
