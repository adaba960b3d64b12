"""Hooks of mkdocs: pages from outside docs/, of every command and dataset, and links between them.

Pages of commands come from their help, those of datasets from conf/dataset and docs/datasets.md, so
they are never out of date.
"""

import html
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

import yaml
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

from metalearn.cli.main import commands, help_of
from metalearn.config import choices, composition

_ROOT = Path(__file__).parent.parent

#: Pages outside docs/ by their address in the manual.
_PAGES = {
    "index.md": "README.md",
    **{name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE")},
    **{path: path for path in (f"benchmarks/{one.name}" for one in _ROOT.glob("benchmarks/*.md"))},
}
#: Commands that show a dataset which needs more than its name.
_OWN = {
    "folder": "dataset.path=photos",
    "text": "dataset.path=texts.csv",
    "features": "dataset.path=table.csv",
    "user_classes": "dataset.path=ratings.csv",
    "user_values": "dataset.path=ratings.csv",
    "mix": "'dataset.parts=[omniglot,glyphs]'",
}


def on_config(config: Any) -> Any:
    """List every command, dataset and method in the navigation, where `nav` names their folder."""
    methods = [name for family in choices.families().values() for name in family]
    pages = {"commands/": commands(), "datasets/": _datasets(), "algorithms/": methods}
    indexes = {"commands/": "commands.md", "datasets/": "datasets.md"}

    def expanded(entry: Any) -> Any:
        if isinstance(entry, list):
            return [expanded(one) for one in entry]
        if isinstance(entry, dict):
            return {title: expanded(one) for title, one in entry.items()}
        if entry not in pages:
            return entry
        first = indexes.get(entry, f"{entry}README.md")
        return [first, *(f"{entry}{name}.md" for name in pages[entry])]

    config.nav = expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside docs/, and one for every command and every dataset."""
    pages = {address: (_ROOT / path).read_text() for address, path in _PAGES.items()}
    rows = []
    for name in commands():
        module = importlib.import_module(f"metalearn.cli.{name}")
        summary = (module.__doc__ or "").partition("\n")[0]
        rows.append(f"| [`metalearn {name}`](commands/{name}.md) | {summary} |")
        pages[f"commands/{name}.md"] = (
            f"# {name}\n\n{summary} This is `metalearn {name} --help`:\n\n"
            f"```text\n{help_of(name).strip()}\n```\n"
        )
    table = "\n".join(["| command | |", "|---|---|", *rows])
    pages["commands.md"] = f"# Commands\n\n{table}\n\n`metalearn --help` lists them.\n"
    pages |= {f"datasets/{name}.md": _dataset(name) for name in _datasets()}
    for address, content in pages.items():
        files.append(File.generated(config, address, content=content))
    return files


def _datasets() -> list[str]:
    """Return the names of all datasets, in the order of the table in docs/datasets.md."""
    return [row.split("`")[1] for row in _table()[2:]]


def _table() -> list[str]:
    """Return the lines of the table of datasets."""
    lines = (_ROOT / "docs/datasets.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("| dataset |"))
    return [line for line in lines[first:] if line.startswith("|")][: len(_names()) + 2]


def _names() -> list[str]:
    return list(choices.options("dataset"))


def _dataset(name: str) -> str:
    """Return the page of a dataset: its row of the table, its source, its settings, samples."""
    head, _, *rows = ([cell.strip() for cell in row[1:-1].split("|")] for row in _table())
    row = next(own for own in rows if own[0] == f"`{name}`")
    dataset = composition.compose_config([f"dataset={name}"]).dataset
    facts = dict(zip(head, row, strict=True)) | {
        "source": str(dataset.source or "your own"), "by hand": str(dataset.by_hand)
    }  # fmt: skip
    lines = [f"| {key} | {value} |" for key, value in list(facts.items())[1:] if value]
    # Links of the table are relative to docs/.
    table = re.sub(r"\]\((?!https?:|#)", "](../", "\n".join(lines)).replace(
        "](#", "](../datasets.md#"
    )
    text = (_ROOT / f"conf/dataset/{name}.yaml").read_text().strip()
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    about = " ".join(line for line in comments if not line.startswith("@package"))
    parents = [one for one in yaml.safe_load(text).get("defaults", []) if isinstance(one, str)]
    links = [f"[{one}]({one}.md)" for one in parents if one != "_self_"]
    others = f" It has those of {', '.join(links)} too." if links else ""
    own = f" {_OWN[name]}" if name in _OWN else ""
    image = f"\n![Samples of {name}](../images/{name}.png)\n"
    return (
        f"# {name}\n\n{html.escape(about)}\n\n| | |\n|---|---|\n{table}\n"
        f"\n```\nmetalearn data {name}{own}\nmetalearn train algo={_method(name)} "
        f"dataset={name}{own}\n```\n"
        + (image if (_ROOT / f"docs/images/{name}.png").exists() else "")
        + f"\n## Settings\n\n`conf/dataset/{name}.yaml`; set any with "
        f"`dataset.<name>=…`.{others}\n\n```yaml\n{text}\n```\n"
    )


def _method(name: str) -> str:
    """Return a method that learns from the tasks of a dataset."""
    return "maml" if name in ("sinusoid", "navigation", "user_values") else "protonet"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages of the manual."""
    here = page.file.src_uri
    folder = posixpath.dirname(_PAGES.get(here, f"docs/{here}"))
    addresses = {path: address for address, path in _PAGES.items()}
    if here == "datasets.md":
        markdown = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](datasets/\1.md) |", markdown, flags=re.M)

    def link(match: re.Match[str]) -> str:
        path, hash, anchor = match[2].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        address = addresses.get(path, path.removeprefix("docs/"))
        return match[1] + posixpath.relpath(address, posixpath.dirname(here) or ".") + hash + anchor

    return re.sub(r'(\]\(|src=")(?!https?:|#)([^)"\s]+)', link, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script.

    Raises:
        PluginError: For a formula with a command that the converter does not know.
    """

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2])
        result: str = convert(tex, display="inline" if match[1] == "(" else "block")
        if re.search(r"\\|&amp;|&#x00026;", result):
            raise PluginError(f"{page.file.src_uri}: latex2mathml cannot convert {tex.strip()}")
        return result

    generic = r'<(?:span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</(?:span|div)>'
    return re.sub(generic, formula, content, flags=re.DOTALL)
