"""Describe a dataset: classes, splits, licence, samples; or list all datasets."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metalearn.cli import _arguments
from metalearn.system.errors import UserError, shortened, writing

HELP = """metalearn data [<dataset>] [split=test] [out=<folder>] [key=value …] [--json]

Without a dataset, lists all of them: which are present, and how to get the others.

With one, downloads its files if they are absent, verifies them, and prints classes, examples and
splits, source, licence, and the hash of the content. Images are drawn into contact sheets, one of
an episode and one of each split; texts are printed.

  metalearn data omniglot episode.way=20
  metalearn data folder dataset.path=photos
  metalearn data clinc150 dataset.split=domains

  split=     of the episode: train, val, test, or all (the classes of all three)
  out=       folder for the contact sheets (default: outputs/data/<dataset>/<time>); files that
             exist are not replaced
  key=value  settings as for metalearn train, such as data_dir=, dataset.…= and episode.…=
  --json     print one JSON document, and nothing else, on standard output

datasets (metalearn list explains them)
  {dataset}
"""
#: What shell completion offers.
TAKES: tuple[str, ...] = (
    "{dataset}", "split=train|val|test|all", "out={folder}", "{settings}", "--json",
)  # fmt: skip

#: Classes and examples of each that the sheet or the list of a split shows.
_SHOWN = {"images": (10, 10), "tokens": (5, 2), "features": (0, 0)}
_TEXTS, _TEXT_LENGTH = 2, 110  # of each class and part; characters


def _data(args: list[str], console: Any) -> dict[str, Any]:
    names = [word for word in args if "=" not in word and not word.startswith("-")]
    names += [word.partition("=")[2] for word in args if word.startswith("dataset=")]
    words = [word for word in args if word not in names and not word.startswith("dataset=")]
    if len(names) > 1:
        raise UserError(f"data {' '.join(names)}: takes the name of one dataset")
    split, out = _arguments.take(words, "split", "test"), _arguments.take(words, "out")
    overrides = _arguments.parse_settings("data", words)
    if names:
        return _one(names[0], overrides, str(split), out, console)
    return _all(overrides, console)


main = _arguments.with_json(_data)


def _settings(overrides: list[str]) -> Any:
    from metalearn.config import paths
    from metalearn.config.checking import check_config
    from metalearn.config.composition import compose_config
    from metalearn.run.parts import data_folder

    config = compose_config(overrides)
    paths.make_absolute(config, overrides, data_folder(check_config(config)))
    return check_config(config)


def _all(overrides: list[str], console: Any) -> dict[str, Any]:
    """List all datasets."""
    from metalearn.report.console import print_line
    from metalearn.run.describe import origins
    from metalearn.run.parts import data_folder

    if other := [word for word in overrides if not word.startswith(("data_dir=", "cache_dir="))]:
        raise UserError(f"{other[0]}: name a dataset, as in metalearn data omniglot {other[0]}")
    settings = _settings(overrides)
    known = origins(settings)
    print_line(console, f"data_dir: {data_folder(settings)}")
    width = max(len(one["dataset"]) for one in known)
    for one in known:
        print_line(console, f"{one['dataset']:<{width}}  {one['state']}: {one['description']}")
        if one["state"] == "by hand":
            print_line(console, f"{'':<{width}}  bring to {one['files'][0]}: {one['by_hand']}")
    return {"data_dir": str(data_folder(settings)), "datasets": known}


def _one(
    name: str, overrides: list[str], split: str, out: str | None, console: Any
) -> dict[str, Any]:
    """Describe one dataset."""
    from metalearn.config.components import make
    from metalearn.report.console import print_line, print_lines
    from metalearn.run.describe import Described, origin

    settings = _settings([f"dataset={name}", *overrides])
    facts = origin(name, make(settings.dataset, "dataset"), settings)
    print_line(console, f"{name}: {facts['description']}")
    stated = (f"{key}: {facts[key] or 'not stated'}" for key in ("source", "licence"))
    print_lines(console, stated, "  ")
    folder = _arguments.output_folder(out, f"data/{name}")
    described = Described(settings, split)
    facts = origin(name, described.dataset, settings) | described.summary()
    print_lines(console, _lines(facts), "  ")
    kind = described.data.inputs.kind
    classes, examples = _SHOWN[kind]
    samples = {part: described.rows(part, classes, examples) for part in facts["splits"]}
    try:
        samples["episode"] = described.episode() if classes else []
    except UserError as error:
        print_line(console, f"  no episode: {error}")
    samples = {part: rows for part, rows in samples.items() if rows}
    given = [word.partition("=")[2] for word in overrides if word.startswith("dataset.path=")]
    title = Path(given[-1].strip("'\"")).name if given else name
    titles = {part: _title(part, rows, facts, split, title) for part, rows in samples.items()}
    if kind == "images":
        facts["sheets"] = _draw(folder, samples, titles, described.is_ink)
        lines = facts["sheets"]
    else:
        plain = {part: [_plain(row) for row in rows] for part, rows in samples.items()}
        facts |= {"sheets": [], "samples": plain}
        lines = [line for part in plain for line in (titles[part], *_examples(plain[part]))]
    print_lines(console, lines, "  ")
    return facts


def _lines(facts: dict[str, Any]) -> list[str]:
    """Return what a summary says, in lines."""
    shape = facts["inputs"].get("shape")
    size = f", {' x '.join(map(str, shape))}" if shape else ""
    lines = [f"content hash: {facts['content_hash']}", f"inputs: {facts['inputs']['kind']}{size}"]
    for split, own in facts["splits"].items():
        rotated = own.get("classes_with_rotations")
        line = f"{split}: {own['classes']:,} class{'es' if own['classes'] != 1 else ''}"
        line += f" ({rotated:,} with rotations)" if rotated else ""
        if "examples" in own:
            low, high = own["smallest_class"], own["largest_class"]
            each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            line += f", {own['examples']:,} examples, {each} of each class"
        lines.append(line)
    return [*lines, f"no classes: {facts['task']}"] if "task" in facts else lines


def _title(part: str, rows: list[Any], facts: dict[str, Any], split: str, name: str) -> str:
    if part != "episode":
        return f"{name}, {part}: {len(rows)} of {facts['splits'][part]['classes']:,} classes"
    shot, query = (rows[0]["counts"][group] for group in ("support", "query"))
    return f"{name}, an episode of {split}: {len(rows)}-way {shot}-shot, {query} queries per class"


def _draw(
    folder: Path, samples: dict[str, list[Any]], titles: dict[str, str], is_ink: bool
) -> list[str]:
    """Draw a contact sheet of each sample; return the files."""
    from metalearn.report.sheets import draw_sheet

    paths = {part: folder / f"{part}.png" for part in samples}
    if existing := [path for path in paths.values() if path.exists()]:
        raise UserError(f"out={folder}: {existing[0]} exists; remove it or choose another folder")
    with writing(f"out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for part, rows in samples.items():
            groups = list(rows[0]["examples"])
            images = [(row["class"], list(row["examples"].values())) for row in rows]
            draw_sheet(paths[part], titles[part], images, groups, is_ink)
    return [str(path) for path in paths.values()]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return texts or tokens of a class as plain data."""
    examples = {
        part: [one if isinstance(one, str) else one.tolist() for one in own]
        for part, own in row["examples"].items()
    }
    return {**row, "examples": examples}


def _examples(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the first texts of each class, in lines."""
    for row in rows:
        for part, examples in row["examples"].items():
            for one in examples[:_TEXTS]:
                text = shortened(" ".join(str(one).split()), _TEXT_LENGTH)
                yield f"  {row['class']}{f', {part}' if part else ''}: {text}"
