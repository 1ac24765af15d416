"""The readers by name. A reader takes a folder and options and returns the homes and the recordings, whose events it reads on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harkd.homes.events import Home, Recording
from harkd.homes.options import ReadOptions
from harkd.homes.readers import adlmr, aras, casas, csv_home, marble, mural, ordonez

Reader = Callable[[Path, ReadOptions], tuple[tuple[Home, ...], tuple[Recording, ...]]]
READERS: dict[str, Reader] = {
    "marble": marble.read,
    "mural": mural.read,
    "casas": casas.read,
    "adlmr": adlmr.read,
    "aras": aras.read,
    "ordonez": ordonez.read,
    "csv": csv_home.read,
}
