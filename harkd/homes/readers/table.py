"""CSV files by column name, in any order of columns. Whatever is wrong with a file is a UserError that names file and line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from harkd.errors import UserError
from harkd.homes.readers.common import text_lines

EPOCH = datetime(1970, 1, 1)


def read_rows(path: Path, columns: Sequence[str], may_be_empty: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, the cells of `columns`) for each row below the header; cells and header lose blanks around them.

    `may_be_empty`: a file of blank lines alone, which has no header either, has no rows. Otherwise it lacks its columns.
    """
    reader = csv.reader((text for _, _, text in text_lines(path)), strict=True)  # strict: an unclosed quote is a fault, not a long cell
    try:
        header = [name.strip() for name in next(reader, [])]
        if may_be_empty and not header and not any(reader):
            return
        absent = [name for name in columns if name not in header]
        if absent:
            raise UserError(f"{path} has no column {absent[0]!r}: its first line names {', '.join(header) or 'nothing'}")
        places = [header.index(name) for name in columns]
        for row in reader:
            if row and len(row) != len(header):
                raise UserError(f"{path}, line {reader.line_num}: {len(row)} cells where the first line names {len(header)}")
            if row:
                yield reader.line_num, [row[place].strip() for place in places]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def milliseconds(text: str, path: Path, line: int) -> int:
    """A UNIX time in whole milliseconds."""
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 13):  # 13 digits reach from 1653 to 2286
        raise UserError(f"{path}, line {line}: {text!r} is not a UNIX time in milliseconds")
    return int(text)


def local_time(time: int, utc_offset: float) -> datetime:
    """The naive local clock, `utc_offset` hours ahead of UTC, at a UNIX time in milliseconds."""
    return EPOCH + timedelta(milliseconds=time, hours=utc_offset)
