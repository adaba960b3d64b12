"""Load the fixtures where tests run: not in the process that only distributes them."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, which takes seconds, unless this process only starts workers."""
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not is_controller:
        config.pluginmanager.import_plugin("tests.fixtures")
