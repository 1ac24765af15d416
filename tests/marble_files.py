"""Hand-made recordings in MARBLE's layout, as several tests need them."""

from pathlib import Path

DAY = 86_400_000
NOON = 1_600_000_000_000 - 1_600_000_000_000 % DAY + DAY // 2  # a noon in UTC, in milliseconds


def csv(path: Path, header: str, *rows: str, end: str = "\r\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{row}{end}" for row in (header, *rows)).encode())
    return path


def environment(instance: Path, *events: tuple[str, str, int, str]) -> Path:
    """Events are (sensor, status, seconds after noon, subject)."""
    rows = (f'{sensor},"{status}",{NOON + 1000 * second},"{subject}"' for sensor, status, second, subject in events)
    return csv(instance / "environmental.csv", "sensor_id,sensor_status,ts,subject_id", *rows)


def labels(instance: Path, subject: str, *intervals: tuple[int, int, str]) -> Path:
    """Intervals are (first second, last second, activity)."""
    rows = (f"{NOON + 1000 * start},{NOON + 1000 * end},{label}" for start, end, label in intervals)
    return csv(instance / f"subject-{subject}" / "labels.csv", "ts_start,ts_end,act", *rows)


def recording(root: Path, id: str, subjects: str, events: int, day: int = 0) -> None:
    """A recording in which the subjects, one letter each, open and close the fridge while they cook."""
    start = day * DAY // 1000
    environment(root / id, *(("R7", ("ON", "OFF")[n % 2], start + n, subjects[n // 2 % len(subjects)]) for n in range(events)))
    for subject in subjects:
        labels(root / id, subject, (start, start + events, "COOKING"))


def marble(root: Path, days: int = 4, events: int = 4) -> Path:
    """A data set of one short recording a day, each a group of its own. Returns `root`."""
    for day in range(days):
        recording(root, f"A1a/instance{day + 1}", "1", events, day)
    return root
