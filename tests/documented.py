"""The commands in README, docs/ and the help of every command, and stand-ins for their data."""

import csv
import io
import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import generated_ratings
from PIL import Image

from metalearn.cli.main import commands as command_names
from metalearn.cli.main import help_of
from metalearn.data.omniglot import vinyals_split

ROOT = Path(__file__).parent.parent
_PROGRAMS = ("metalearn", "make", "python", "torchrun")
_BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M)
#: What placeholders mean here; first those with more context.
_MEANINGS = {
    "outputs/multirun/<time>/0": "run0",
    "plot outputs/rates": "plot sweep",
    "outputs/multirun/<time>": "sweep",
    "outputs/predict/<time>": "labels",
    "<time>": "T",
    "evaluate …": "evaluate outputs/maml-omniglot/T",
    "plot …": "plot outputs/maml-omniglot/T",
    "run=…": "run=outputs/maml-omniglot/T",
    "train …": "train algo=maml",
    "run=<folder of the run>": "run=run0",
    "run=outputs/protonet-omniglot/T": "run=run0",
    "<out>": "labels",
    "<many classes>": "many",
    "/path/to/images": "photos",
    "<run>": "outputs/maml-omniglot/T",
    "<folder with omniglot>": "data",
    "<folder> curve=steps": "outputs/maml-omniglot/T curve=steps",
    "<folder>": "run0",
    "resume <trial>": "resume run0",
    "<experiment>": "protonet_omniglot_5w1s",
    "<dataset>": "glyphs",
    "budget=…": "budget=smoke",
    "support=examples query": "support=cells query",
    "remove=cat": "remove=Platelets",
    "nproc_per_node=4": "nproc_per_node=2 --standalone",
    "data_dir=…": "data_dir=data",
    "DATA=…": "DATA=data",
}


def _lines(text: str) -> list[str]:
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def commands() -> dict[str, str]:
    """Return the commands, without prompt and comment, and the page where each is first.

    In running text, the name of a command without arguments is a mention of it and no command.
    """
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
    pages = {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}
    found = [
        (line, page) for page, text in pages.items() for block in _BLOCK.findall(text)
        for line in _lines(block)
    ]  # fmt: skip
    found += [
        (re.sub(r"\s+", " ", code), page)
        for page, text in pages.items()
        for code in re.findall(r"`([^`]+)`", _BLOCK.sub("", text))
        if not re.fullmatch(r"metalearn( --)?( ?\S+)?", code)
    ]
    found += [
        (re.split(r"\s{2,}", line.strip())[0], f"metalearn {name} --help")
        for name in command_names()
        for line in help_of(name).splitlines()
        if line.startswith("  metalearn ")
    ]
    result: dict[str, str] = {}
    for line, page in found:
        for part in line.removeprefix("$ ").split(" && "):
            command = re.sub(r"\s+#.*", "", part).strip()
            if command.startswith(tuple(f"{program} " for program in _PROGRAMS)):
                result.setdefault(command, page)
    return result


def words_of(command: str) -> list[str]:
    """Return the words of a command, with something for each placeholder."""
    for placeholder, meaning in _MEANINGS.items():
        command = command.replace(placeholder, meaning)
    return shlex.split(command)


def _drawing(number: int, size: int, mode: str) -> bytes:
    """Return a PNG file; every number gives a different image."""
    stream, image = io.BytesIO(), Image.new(mode, (size, size), 1 if mode == "1" else (9, 99, 199))
    black = 0 if mode == "1" else (0, 0, 0)
    for bit in range(20):
        if number >> bit & 1:
            step = size // 5
            x, y = bit % 5 * step, bit // 5 * step
            image.paste(black, (x, y, x + step, y + step))
    image.save(stream, "png")
    return stream.getvalue()


def write_data(folder: Path) -> None:
    """Write stand-ins for Omniglot (all characters) and CIFAR-100, as METALEARN_DATA."""
    characters = sorted(name for names in vinyals_split().values() for name in names)
    (folder / "omniglot").mkdir(parents=True)
    for part, first, last in (("images_background", 0, 964), ("images_evaluation", 964, 1623)):
        with zipfile.ZipFile(folder / f"omniglot/{part}.zip", "w") as archive:
            for number in range(20 * first, 20 * last):
                name = f"{part}/{characters[number // 20]}/{number}.png"
                archive.writestr(name, _drawing(number, 28, "1"))
    split = json.loads((ROOT / "metalearn/data/splits/cifar_fs.json").read_text())
    classes = sorted(name for part in ("train", "val", "test") for _, name in split[part])
    (folder / "cifar100").mkdir()
    with zipfile.ZipFile(folder / "cifar100/images.zip", "w") as archive:
        for number in range(30 * len(classes)):
            name = f"{classes[number // 30]}/{number}.png"
            archive.writestr(name, _drawing(number, 32, "RGB"))


def write_workspace(folder: Path) -> None:
    """Write the files that commands name: examples, new items, photos, tables."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    cells = ROOT / "examples/bccd/support"
    for name in ("cells", "bccd", "more_examples", "examples2"):
        shutil.copytree(cells, folder / name)
    for name in ("new", "more"):
        shutil.copytree(ROOT / "examples/bccd/query", folder / name)
    for name, classes in (("photos", 13), ("many", 25)):
        for number in range(16 * classes):
            path = folder / f"{name}/class{number // 16}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_drawing(number, 32, "RGB"))
    for name in ("photos.zip", "birds.zip"):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for number, path in enumerate(sorted((folder / "photos").glob("*/*.png"))):
                content = _drawing(number + (20_000 if name[0] == "b" else 0), 32, "RGB")
                archive.writestr(f"{path.parent.name}/{path.name}", content)
    generated_ratings.write(folder / "ratings.csv")
    with (folder / "examples.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        for number in range(10):
            writer.writerow((f"my card {number} is lost", "card"))
            writer.writerow((f"will it rain at {number}", "weather"))
    (folder / "new.txt").write_text("where is my card\nis it raining\n")
