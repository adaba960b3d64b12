"""Draw contact sheets: a row of images for each class."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from metalearn.system.atomic import atomic_writer

_WIDTH = 860  # pixels: that of a page of text
_CELL = (56, 84)  # smallest and largest side of an image, in pixels
_GAP, _BETWEEN, _LABEL = 4, 20, 190  # between images, between groups, widest label
_CAPTION, _LINE = 18, 34  # heights of a text below an image, and of a row of text
_SIZES = {"title": 17, "label": 13}


def draw_sheet(
    path: Path,
    title: str,
    rows: Sequence[tuple[str, Sequence[Sequence[Tensor]]]],
    headings: Sequence[str],
    is_ink: bool = False,
    predictions: Sequence[Sequence[str]] = (),
) -> None:
    """Draw images with labels into a PNG file.

    Args:
        path: The file; one that exists is replaced.
        title: Line above.
        rows: Label, and groups of images, float [C, H, W] in [0, 1] with 1 or 3 channels. A row
            without groups is a line of text.
        headings: Line above each group; "" for none.
        is_ink: Whether to draw 1 dark and 0 light, as ink on paper.
        predictions: For each row, what each image of its last group was taken for: "" for what it
            is, which is framed green; a wrong name is framed red and written below its image.
    """
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    fonts = {name: ImageFont.truetype(font, size) for name, size in _SIZES.items()}
    label_width = min(
        _LABEL, max(math.ceil(fonts["label"].getlength(one)) for one, own in rows if own)
    )
    full = [groups for _, groups in rows if groups]
    totals = [max(len(groups[place]) for groups in full) for place in range(len(headings))]
    height, width = full[0][0][0].shape[-2:]
    factor = max(1, round(_CELL[0] / max(height, width)))
    scale = min(factor, _CELL[1] / max(height, width))
    cell = round(width * scale), round(height * scale)
    sizes = _fitting(totals, (_WIDTH - label_width - 2 * _BETWEEN) // (cell[0] + _GAP))
    top = 34 + (20 if any(headings) else 0)
    lefts = [_GAP + label_width + _BETWEEN // 2]
    for size in sizes:
        lefts.append(lefts[-1] + size * (cell[0] + _GAP) + _BETWEEN)
    row_height = cell[1] + _GAP + (_CAPTION if predictions else 0)
    heights = [row_height if groups else _LINE for _, groups in rows]
    columns = [
        (left, f"{heading}, {size} of {total}" if heading and size < total else heading)
        for left, heading, size, total in zip(lefts[:-1], headings, sizes, totals, strict=True)
    ]
    ends = [lefts[-1] - _BETWEEN, math.ceil(fonts["title"].getlength(title))]
    ends += [left + math.ceil(fonts["label"].getlength(heading)) for left, heading in columns]
    sheet = Image.new("RGB", (max(ends) + 2 * _GAP, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 5), title, "black", fonts["title"])
    for left, heading in columns:
        draw.text((left, 31), heading, "#555", fonts["label"])
    for number, (label, groups) in enumerate(rows):
        y = top + sum(heights[:number])
        if not groups:
            draw.text((_GAP, y + _LINE - 6), label, "black", fonts["label"], anchor="ls")
            continue
        shown = _shortened(label, fonts["label"], label_width)
        draw.text((_GAP, y + cell[1] // 2), shown, "black", fonts["label"], anchor="lm")
        for left, size, group in zip(lefts, sizes, groups, strict=False):
            for place, x in enumerate(group[:size]):
                image, x0 = _image(1 - x if is_ink else x, cell), left + place * (cell[0] + _GAP)
                sheet.paste(image, (x0, y))
                box = (x0 - 1, y - 1, x0 + cell[0], y + cell[1])
                if predictions and group is groups[-1]:
                    wrong = predictions[number][place]
                    colour = "#c22" if wrong else "#2a2"
                    draw.rectangle(box, outline=colour, width=2)
                    middle = (x0 + cell[0] // 2, y + cell[1] + 2)
                    draw.text(middle, wrong, colour, fonts["label"], anchor="ma")
                elif not is_ink:  # white images have no edge
                    draw.rectangle(box, outline="#ccc")
    is_grey = all(x.shape[0] == 1 for groups in full for group in groups for x in group)
    if is_grey and not predictions:
        sheet = sheet.convert("L")  # a third of the size
    with atomic_writer(path) as stream:
        sheet.save(stream, "PNG", optimize=True)


def _fitting(sizes: list[int], most: int) -> list[int]:
    """Return how many images of each group fit into a row: the first groups keep most of theirs."""
    result: list[int] = []
    for place, size in enumerate(sizes):
        rest = most - sum(result) - (len(sizes) - place - 1) * 3
        result.append(min(size, max(1, rest)))
    return result


def _shortened(label: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a label that fits; the end of it, where names differ, is kept."""
    if font.getlength(label) <= width:
        return label
    while label and font.getlength("…" + label) > width:
        label = label[1:]
    return "…" + label


def _image(x: Tensor, size: tuple[int, int]) -> Image.Image:
    array = (x.clamp(0, 1) * 255).round().byte().numpy()
    image = Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))
    is_larger = size[0] % image.width == 0
    method = Image.Resampling.NEAREST if is_larger else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, method)
