"""What the tests of the readers share: files written from text, the events read back, and bytes gone wrong."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harkd.errors import UserError
from harkd.homes.dataset import Dataset, read


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def events(dataset: Dataset, recording: str | None = None) -> list:
    """All events of a data set, or of one recording."""
    return [event for it in dataset.recordings() if recording in (None, it.id) for event in it.events()]


def told(dataset: Dataset) -> list[tuple]:
    """What a test compares: time of day, description, labels, resident."""
    return [(f"{event.time:%H:%M:%S}", event.description, event.labels, event.resident) for event in events(dataset)]


def fault(reader: str, root: Path) -> str:
    """The one sentence that a reader says of files at fault."""
    try:
        read(f"{reader}:{root}").survey()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("nothing was found at fault")


def faults(reader: str, *cases: tuple[dict[str, str | bytes], str]):
    """A test: a folder with these files is at fault, and the one sentence that is said of it holds this."""

    @pytest.mark.parametrize(("files", "said"), cases, ids=[said for _, said in cases])
    def test(tmp_path, files, said):
        assert said in fault(reader, write(tmp_path, files))

    return test


def survives(reader: str, files: dict[str, str | bytes]):
    """A test: whatever bytes one stretch of one file is overwritten with, the files are read, or a fault names file and line."""
    contents = {name: content if isinstance(content, bytes) else content.encode() for name, content in files.items()}
    of_note = [b'"', b"\n", b"\r", b"\xff", b"\x00", b",", b"\t", b" ", b"9" * 30, b"-1", b"[", b"}", b"\xc2\x85", b"2 13", b"begin", b"ON"]
    replacement = st.one_of(st.binary(max_size=6), st.sampled_from(of_note))
    change = st.tuples(st.sampled_from(sorted(contents)), st.floats(0, 1), st.integers(0, 12), replacement)

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(change, min_size=1, max_size=2))
    def test(changes):
        with tempfile.TemporaryDirectory() as folder:
            changed = dict(contents)
            for name, place, length, replacement in changes:
                start = int(place * len(changed[name]))
                changed[name] = changed[name][:start] + replacement + changed[name][start + length :]
            write(Path(folder), changed)
            try:
                dataset = read(f"{reader}:{folder}")
                report = dataset.survey()
                assert report.events == len(events(dataset))
            except UserError as error:
                assert any(Path(name).name in str(error) for name in contents), error
                assert re.search("line [0-9]|entry [0-9]|has no column", str(error)), error

    return test
