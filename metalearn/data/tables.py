"""Read texts and CSV files of any encoding, with or without a header."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from metalearn.system.errors import UserError, first_line


def read_csv(path: Path) -> list[list[str]]:
    """Read the rows of a CSV file, in any of the encodings of `read_text`, that are not blank."""
    try:
        content = io.StringIO(read_text(path), newline="")
        return [row for row in csv.reader(content, strict=True) if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None


def table(
    path: Path, rows: list[list[str]], columns: Mapping[str, Sequence[str]]
) -> tuple[list[dict[str, str]], int]:
    """Find the columns of a CSV file by its header, or without one by their order.

    `columns` has the names that a header may give to each column, the required one first. A first
    row without any of them is no header; one without the required column is a UserError. Return
    cells of each row by column, "" for a missing one; and the number of the first of these rows, 1
    without a header.
    """
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    places = {
        name: next((header.index(one) for one in names if one in header), None)
        for name, names in columns.items()
    }
    first, required = 2, next(iter(columns))
    if all(place is None for place in places.values()):
        places, first = {name: place for place, name in enumerate(columns)}, 1
    elif places[required] is None:
        raise UserError(f"{path}: its first row names no column {required}; rename one")
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
            return content.decode("utf-16")
        if b"\0" in content:
            raise ValueError("it has zero bytes, as no text has; save it as UTF-8")
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError:
            return content.decode("cp1252", errors="replace")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)})") from None
