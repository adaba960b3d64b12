"""Load the fixtures where tests run: not in the process that only distributes them."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, which takes seconds, unless this process only starts workers."""
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not is_controller:
        config.pluginmanager.import_plugin("tests.fixtures")


#: Known defects, to be fixed: the end of a test's name, and what is wrong.
_KNOWN = {
    "test_every_method_is_exported_or_says_why_not[in_context]": "its graph has a fixed number of queries",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for name, reason in _KNOWN.items():
            if item.nodeid.endswith(name):
                item.add_marker(pytest.mark.xfail(reason=reason))
