"""Hooks of mkdocs: pages from outside docs/, a page of all commands, and links between them."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from metalearn.cli.main import commands, help_of

_ROOT = Path(__file__).parent.parent

#: Pages outside docs/ by their address in the manual.
_PAGES = {
    "index.md": "README.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")},
    **{path: path for path in (f"benchmarks/{one.name}" for one in _ROOT.glob("benchmarks/*.md"))},
}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/ and the help of every command."""
    for address, path in _PAGES.items():
        files.append(File.generated(config, address, content=(_ROOT / path).read_text()))
    text = "# Commands\n\nEach is printed by `metalearn <command> --help`.\n"
    for name in commands():
        text += f"\n## {name}\n\n```text\n{help_of(name).strip()}\n```\n"
    files.append(File.generated(config, "commands.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages of the manual."""
    here = page.file.src_uri
    folder = posixpath.dirname(_PAGES.get(here, f"docs/{here}"))
    addresses = {path: address for address, path in _PAGES.items()}

    def link(match: re.Match[str]) -> str:
        path, hash, anchor = match[2].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        address = addresses.get(path, path.removeprefix("docs/"))
        return match[1] + posixpath.relpath(address, posixpath.dirname(here) or ".") + hash + anchor

    return re.sub(r'(\]\(|src=")(?!https?:|#)([^)"\s]+)', link, markdown)
