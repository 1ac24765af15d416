"""JSON lines that outlive a kill: one object a line, each written whole by one call, and there once its newline is.

A kill can tear the last line alone. A writer cuts a torn line off when it opens the file, so that a continued run writes that record
again, and before it appends, for several processes may write; the reader passes over it. A file of another kind is left as it is.
Text is escaped to ASCII: any text can be stored, lone surrogates too, and no character but the newline ends a line.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harkd.errors import UserError


class JsonLinesWriter:
    """Appends objects to a file, which it makes where there is none.

    `repaired` is the number of bytes of torn last lines that it cut off; stderr is told when it opens the file. Raises UserError where a
    torn last line is none of an object's, or stands behind what are no JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.repaired = Path(path), 0
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with self._alone():
            if self.repaired:
                print(f"{self.path} ended in a torn line of {self.repaired} bytes, which was cut off", file=sys.stderr)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing, and see that the file ends with a whole line."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                self.repaired += _cut_torn_line(self.path)
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def append(self, record: Mapping[str, Any], sync: bool = True) -> None:
        """Write one object, and wait until it is on the disk unless it costs little to make again: a kill loses nothing either way.

        Raises UserError where the disk does not take it; the file stays as it was.
        """
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            with self._alone():
                size = os.fstat(self._file).st_size
                if os.write(self._file, line) != len(line):  # a full disk: leave no torn line behind
                    os.ftruncate(self._file, size)
                    raise OSError(errno.ENOSPC, "no room for a whole record")
            if sync:
                os.fsync(self._file)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> JsonLinesWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> int:
    """Cut a file back to its last newline. Returns how many bytes went."""
    with open(path, "rb+") as file:
        last = b"".join(deque(file, maxlen=1))
        if not last or last.endswith(b"\n"):
            return 0
        if not b'{"'.startswith(last[:2]):
            raise UserError(f"{path} does not hold JSON lines: name another file")
        deque(read_json_lines(path), maxlen=0)  # raises where the lines above are none
        file.truncate(file.tell() - len(last))
    return len(last)


def read_json_lines(path: Path, counts: Counter[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The (line number from 1, object) of every line of a file, one after the other.

    A torn last line is passed over, and counted in counts["torn"].
    Raises UserError naming file and line where any other line is no JSON object.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if line.endswith(b"\n"):
                        raise UserError(f"{path}, line {number} is not JSON ({error}): remove the line or restore the file") from None
                    if counts is not None:
                        counts["torn"] += 1
                    return
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number} holds no JSON object: remove the line or restore the file")
                yield number, record
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
