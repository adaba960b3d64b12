"""Load the fixtures where tests run: not in the process that only distributes them."""

from collections import Counter

import pytest

#: The files that take the longest, first those with the most seconds.
_LONGEST = (
    "test_documented_commands", "test_contract", "test_export", "test_commands", "test_capture",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Import the fixtures, which takes seconds, unless this process only starts workers."""
    is_controller = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not is_controller:
        config.pluginmanager.import_plugin("tests.fixtures")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, then those with the most tests, so that no worker waits at the end."""
    counts = Counter(item.path.stem for item in items)
    places = {name: place for place, name in enumerate(_LONGEST)}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = item.path.stem
        return places.get(name, len(places)), -counts[name], name

    items.sort(key=place)
