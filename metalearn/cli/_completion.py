"""Shell completion, which Hydra prints."""

import os
import re

from metalearn.cli._launch import hydra_main
from metalearn.system.errors import UserError


def complete(words: list[str]) -> None:
    """Print Hydra's shell completion.

    Raises:
        UserError: For a shell that is not supported.
    """
    words = [word for word in words if word != "train"]  # our command; Hydra does not know it
    action = next((word for word in words if not word.startswith("-")), "")
    if not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", action):
        raise UserError(
            f"-sc {action}: should be install=bash, uninstall=bash or query=bash (or zsh, fish)"
        )
    line = os.environ.get("COMP_LINE", "")
    os.environ["COMP_LINE"] = line.replace("metalearn train", "metalearn", 1)
    hydra_main(lambda config: None, words)
