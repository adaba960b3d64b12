"""Write metalearn/config/settings_index.json: settings of every component, names of losses.

python scripts/settings_index.py [check]

The file makes the settings readable without importing torch. With `check`, write nothing and fail
if the file does not match the code.
"""

import dataclasses
import importlib
import json
import pkgutil
import sys
from typing import Any

from metalearn.config import components
from metalearn.tasks.augment import AUGMENTATIONS
from metalearn.tasks.losses import LOSSES
from metalearn.tasks.mixing import MIXINGS

#: Packages of components, and the method that identifies a component's class.
_PACKAGES = {
    "algorithms": "adapt", "data": "open", "backbones": "embed", "report": "log_result",
}  # fmt: skip


def plain(setting: components.Setting) -> dict[str, Any]:
    """Return a setting of a component as plain data."""
    name = next(name for name, kind in components.TYPES.items() if kind == setting.kind)
    default = {"default": setting.default[0]} if setting.default else {}
    rule = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in setting.rule.items()
    }
    return {"name": setting.name, "type": name, **default, **rule}


def index() -> dict[str, list[dict[str, object]]]:
    """Return the settings of each class by its `_target_`."""
    classes = {}
    for package_name, method in _PACKAGES.items():
        package = importlib.import_module(f"metalearn.{package_name}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, cls in vars(importlib.import_module(module.name)).items():
                if not isinstance(cls, type) or cls.__module__ != module.name:
                    continue
                if dataclasses.is_dataclass(cls) and hasattr(cls, method):
                    settings = [plain(one) for one in components.settings_of(cls)]
                    classes[f"{module.name}.{name}"] = settings
    return dict(sorted(classes.items()))


def names() -> dict[str, list[str]]:
    """Return the names of the package's own losses, augmentations and ways of mixing."""
    losses = {name: loss for by_kind in LOSSES.values() for name, loss in by_kind.items()}
    groups: dict[str, dict[str, Any]] = {
        "loss": losses, "augment": dict(AUGMENTATIONS), "mix": dict(MIXINGS),
    }  # fmt: skip
    return {
        group: [name for name, one in own.items() if one.__module__.startswith("metalearn.")]
        for group, own in groups.items()
    }


def text() -> str:
    """Return the content of the file, one line per setting."""
    parts = [f'"names": {json.dumps(names())}']
    for target, settings in index().items():
        lines = ",\n  ".join(json.dumps(one) for one in settings)
        parts.append(f'"{target}": [\n  {lines}\n]' if lines else f'"{target}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        if components.INDEX_FILE.read_text() != text():
            name = components.INDEX_FILE.name
            sys.exit(f"{name}: out of date; run: python scripts/settings_index.py")
    else:
        components.INDEX_FILE.write_text(text())
