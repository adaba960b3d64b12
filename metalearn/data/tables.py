"""Read texts and CSV files of any encoding, with or without a header."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from metalearn.system.errors import UserError, first_line


def read_csv(path: Path) -> list[list[str]]:
    """Read the rows of a CSV file, in any of the encodings of `read_text`, that are not blank.

    Cells are separated by commas, unless only semicolons or tabs give all rows, of which there are
    several, the same number.
    """
    content = read_text(path)

    def rows(delimiter: str) -> list[list[str]]:
        cells = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=delimiter)
        return [row for row in cells if any(row)]

    def is_table(delimiter: str) -> bool:
        try:
            sizes = [len(row) for row in rows(delimiter)]
        except csv.Error:
            return False
        return len(sizes) > 1 and len(set(sizes)) == 1 and sizes[0] > 1

    try:
        return rows(next(filter(is_table, ",;\t"), ","))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def table(
    path: Path, rows: list[list[str]], columns: Mapping[str, Sequence[str]], required: int = 1
) -> tuple[list[dict[str, str]], int]:
    """Find the columns of a CSV file by its header, or without one by their order.

    `columns` has the names that a header may give to each column, the required ones first. A first
    row without any of them is no header; one without a required column is a UserError. Return
    cells of each row by column, "" for a missing one; and the number of the first of these rows, 1
    without a header.
    """
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    places = {
        name: next((header.index(one) for one in names if one in header), None)
        for name, names in columns.items()
    }
    first = 2
    absent = [name for name in list(columns)[:required] if places[name] is None]
    if all(place is None for place in places.values()):
        places, first = {name: place for place, name in enumerate(columns)}, 1
    elif absent:
        raise UserError(f"{path}: its first row names no column {absent[0]}; rename one")
    return [
        {
            name: row[place].strip() if place is not None and place < len(row) else ""
            for name, place in places.items()
        }
        for row in rows[first - 1 :]
    ], first


def read_text(path: Path) -> str:
    """Read a file in UTF-8, UTF-16 with a byte order mark, or else Windows-1252.

    Raise UserError if it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = content.decode("utf-16")
        else:
            try:
                text = content.decode("utf-8-sig")
            except UnicodeDecodeError:
                text = content.decode("cp1252", errors="replace")
        if "\0" in text:
            raise ValueError("it has zero bytes, as no text has; save it as UTF-8")
        return text
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
