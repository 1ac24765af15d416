"""Baselines that see the order of events: a hidden Markov model, and a bidirectional GRU.

`hmm`: the label is the hidden state, sensor and state what it shows. With counts from the training windows, each plus 1 (Laplace),

    start[i], transition[i, j], emission[i, v] = P(first label i), P(label j after i), P(v shown at label i)

where only neighbours that both have labels count as a transition, and what training never showed is one more v. An event gets the label
of the highest P(label | all events of the window), by the forward and backward recursions. `hmm-recording` learns from whole recordings
and sees them: a row of its own, since it is told more.

`bigru`: embeddings of sensor and state (one for all that training never showed, learned where others are hidden at random), the hour as a
point on a circle and the time since the event before go through a GRU in each direction. Cross-entropy over labelled events, AdamW.

Source: L. Rabiner, A Tutorial on Hidden Markov Models, 1989; K. Cho et al., arXiv 1406.1078.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from harkd.homes.events import Window
from harkd.scoring.baselines import joined, recordings, seen_labels, sensor_state, targets

if TYPE_CHECKING:
    import torch

Shown = tuple[str, str, str]  # room, sensor, state


@dataclass(frozen=True, eq=False)
class Hmm:
    """`start` [L], `transition` [L, L], and `emission` [V + 1, L], whose last row is for what training never showed."""

    labels: tuple[str, ...]
    places: Mapping[Shown, int]
    start: np.ndarray
    transition: np.ndarray
    emission: np.ndarray
    whole: ClassVar[bool] = False  # whether it sees whole recordings

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> Hmm:
        """Learn from training windows; `labels` are those on offer, in the home's order. UserError if no event has a label."""
        start, transition = np.zeros(len(labels)), np.zeros((len(labels), len(labels)))
        shown: dict[Shown, np.ndarray] = defaultdict(lambda: np.zeros(len(labels)))
        for window in map(joined, recordings(windows)) if cls.whole else windows:
            rows = targets(window, labels)
            start += rows[:1].sum(axis=0)
            transition += rows[:-1].T @ rows[1:]
            for event, row in zip(window.events, rows):
                if row.any():
                    shown[sensor_state(event)] += row
        counts = np.array([*shown.values(), np.zeros(len(labels))])
        seen = seen_labels(counts.sum(axis=0))
        start, transition, emission = start[seen] + 1, transition[np.ix_(seen, seen)] + 1, counts[:, seen] + 1
        smoothed = start / start.sum(), transition / transition.sum(axis=1, keepdims=True), emission / emission.sum(axis=0)
        return cls(tuple(labels[i] for i in seen), {value: place for place, value in enumerate(shown)}, *smoothed)

    def posterior(self, window: Window) -> np.ndarray:
        """The probability of each label for each event, given all events of the window, [N, L]."""
        emission = self.emission[[self.places.get(sensor_state(event), -1) for event in window.events]]  # [N, L]
        before, after = np.empty_like(emission), np.ones_like(emission)
        belief = self.start
        for n, shown in enumerate(emission):
            before[n] = belief * shown
            before[n] /= before[n].sum()  # scaled, or long recordings would underflow
            belief = before[n] @ self.transition
        for n in range(len(emission) - 1, 0, -1):
            after[n - 1] = self.transition @ (emission[n] * after[n])
            after[n - 1] /= after[n - 1].sum()
        both = before * after
        return both / both.sum(axis=1, keepdims=True)

    def predict(self, window: Window) -> list[str]:
        return [self.labels[i] for i in self.posterior(window).argmax(axis=1)]


class RecordingHmm(Hmm):
    """The same over whole recordings: `predict` takes a recording's events as one window."""

    whole = True


EMBEDDING, HIDDEN, BATCH, RATE, HIDE = 32, 32, 64, 1e-2, 0.05
PASSES, FEWEST, MOST = 10, 200, 800  # steps: ten passes over the windows, but no fewer and no more than these


@dataclass(frozen=True, eq=False)
class BiGru:
    """`network` holds the modules embedding, gru and head; place 0 is for what training never showed."""

    labels: tuple[str, ...]
    places: Mapping[Shown, int]
    network: Any

    @classmethod
    def fit(cls, windows: Iterable[Window], labels: Sequence[str]) -> BiGru:
        """Train on windows; `labels` are those on offer, in the home's order. UserError if no event has a label.

        Neither reads nor moves torch's random state, and uses one thread, so that the result is the same beside whatever else runs.
        """
        import torch

        examples = [(window, rows) for window in windows if (rows := targets(window, labels).astype(np.float32)).any()]
        seen = seen_labels(sum((rows.sum(axis=0) for _, rows in examples), np.zeros(len(labels))))
        shown = dict.fromkeys(sensor_state(event) for window, _ in examples for event in window.events)
        places = {value: place for place, value in enumerate(shown, 1)}
        data = [(*_inputs(window, places), torch.from_numpy(rows[:, seen])) for window, rows in examples]
        lengths = torch.tensor([len(rows) for _, rows in examples])
        padded = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*data)]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                network = _trained(*padded, lengths, len(places) + 1)
        finally:
            torch.set_num_threads(threads)
        return cls(tuple(labels[i] for i in seen), places, network)

    def predict(self, window: Window) -> list[str]:
        import torch

        with torch.inference_mode():
            values, times = _inputs(window, self.places)
            logits = _logits(self.network, values[None], times[None], torch.tensor([len(values)]))
        return [self.labels[i] for i in logits[0].argmax(dim=1)]


def _inputs(window: Window, places: Mapping[Shown, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of N events: places of what they show, [N], and their times, [N, 3]: the hour on a circle, log of the gap in minutes."""
    import torch

    times, before = [], None
    for event in window.events:
        angle = 2 * math.pi * (event.time.hour + event.time.minute / 60) / 24
        gap = abs((event.time - (before or event.time)).total_seconds())
        before = event.time
        times.append((math.sin(angle), math.cos(angle), math.log1p(gap / 60)))
    return torch.tensor([places.get(sensor_state(event), 0) for event in window.events]), torch.tensor(times)


def _trained(values: torch.Tensor, times: torch.Tensor, wanted: torch.Tensor, lengths: torch.Tensor, n_places: int) -> torch.nn.ModuleDict:
    """A network fitted to W windows: [W, N], [W, N, 3], [W, N, L], whose rows of padding and unscored events are zeros, and [W]."""
    import torch

    gru = torch.nn.GRU(EMBEDDING + 3, HIDDEN, batch_first=True, bidirectional=True)
    head = torch.nn.Linear(2 * HIDDEN, wanted.shape[-1])
    network = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(n_places, EMBEDDING), "gru": gru, "head": head})
    steps = min(MOST, max(FEWEST, PASSES * len(values) // BATCH))
    optimiser = torch.optim.AdamW(network.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, steps)
    for _ in range(steps):
        rows = torch.randint(len(values), (BATCH,))
        hidden = values[rows] * (torch.rand(values[rows].shape) >= HIDE)
        loss = -(wanted[rows] * _logits(network, hidden, times[rows], lengths[rows]).log_softmax(dim=-1)).sum() / wanted[rows].sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network


def _logits(network: torch.nn.ModuleDict, values: torch.Tensor, times: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[B, N, L] for values [B, N], times [B, N, 3] and lengths [B]; the backward direction begins at each window's own end."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    inputs = torch.cat([network["embedding"](values), times], dim=-1)
    packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    return network["head"](pad_packed_sequence(network["gru"](packed)[0], batch_first=True, total_length=values.shape[1])[0])
