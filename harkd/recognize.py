"""Live: a home's sensor events come in one by one, and the activity behind each goes out, with its probability.

    python -m harkd.recognize --model Qwen/Qwen3-0.6B --adapter runs/adapter --home home.json < events.jsonl

    in     {"time": "2024-05-01 07:22:45", "sensor": "fridge", "room": "kitchen", "state": "opened"}
    out    the same object, with whatever else it holds, and "activity", "probability" and, with --reasoning, "reasoning"

A window is labelled as soon as it is full, or when its oldest event has waited for --max-wait seconds; in a burst as many full windows at
once as --batch says. What comes in first goes out first, and nothing is lost: what reads ahead waits when 16,384 events do. The prompt
that all windows share is computed once and stays in the cache. A line that is no event is told on stderr and left out. At the end of the
input what waits is labelled, and the last line counts the events and the lines that were skipped. With `--out FILE` answers are appended
there in place of stdout, by one process at a time, and the same command goes on behind the last one, if it is given the same events
again, and refuses others.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from harkd.doors import Parser, add_model_arguments, add_sampling_arguments, enter, machine_of, sampling_of
from harkd.errors import UserError
from harkd.files import hold
from harkd.homes.events import Event
from harkd.homes.prompt import CONTROL
from harkd.homes.readers.common import clock
from harkd.homes.readers.csv_home import SURROGATE
from harkd.jsonl import JsonLinesWriter, read_json_lines
from harkd.live import Live, Recognizer, check_wait, live_mode

ANSWER = ("activity", "probability", "reasoning")  # what is added to an event
LONGEST, LINE = 500, 1 << 16  # bytes of what an event tells, and of its line


def serve(
    recognizer: Recognizer, lines: Iterable[bytes], write: Callable[[dict[str, Any]], None], max_wait: float = 60.0,
    reasoning: bool = False, answered: Iterable[dict[str, Any]] = (),
) -> dict[str, int]:  # fmt: skip
    """Label the events in JSON lines, read ahead in a thread of its own, and `write` an object for each, but for those `answered` before,
    which come first. Returns counts. Raises UserError for other events than those, and what `lines` raise when what was read is labelled.
    """
    live, told, counts, answered = Live(recognizer, max_wait), deque[dict[str, Any]](), Counter(events=0, skipped=0), iter(answered)
    failures: list[Exception] = []

    def take() -> None:
        """Read ahead."""
        try:
            for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
                try:
                    given, event = _event(line, counts["events"])
                except UserError as error:
                    counts["skipped"] += 1
                    print(f"line {number} is skipped: {error}", file=sys.stderr)
                    continue
                counts["events"] += 1
                if (before := next(answered, None)) is None:
                    told.append(given)
                    live.put(event)
                elif any(before.get(name) != value for name, value in given.items() if name not in ANSWER):
                    other = "give the same events again, or name another file with --out"
                    raise UserError(f"line {number} is not the event that was answered there before: {other}")
        except Exception as error:
            failures.append(error)
        finally:
            live.close()

    Thread(target=take, daemon=True).start()  # a daemon: it may wait for input when the process is to end
    for found in live:
        answer = {"activity": found.activity, "probability": found.probability}
        write({**told.popleft(), **answer, **({"reasoning": found.reasoning} if reasoning else {})})
    if failures:
        raise failures[0]
    return dict(counts)


def _event(line: bytes, number: int) -> tuple[dict[str, Any], Event]:
    """(the object as given, its event). UserError where it is none, or none for a prompt."""
    if len(line) > LINE:
        raise UserError(f"it has more than {LINE} bytes")
    try:
        given = json.loads(line)
        json.dumps(given, allow_nan=False)
    except (ValueError, RecursionError):
        raise UserError("it is not JSON, or holds a number that is not finite") from None
    of = given.get if isinstance(given, dict) else {}.get
    texts = [of("time"), of("sensor"), of("room", ""), of("state")]
    if not all(isinstance(text, str) for text in texts):
        raise UserError('an event is an object with the texts "time", "sensor" and "state", and perhaps "room"')
    moment = clock(texts[0].replace("T", " "))
    if moment is None:
        raise UserError(f"{texts[0][:40]!r} is not a time YYYY-MM-DD HH:MM:SS")
    event = Event(number, moment, *texts[1:])
    if CONTROL.search(event.description) or SURROGATE.search(event.description) or len(event.description.encode()) > LONGEST:
        raise UserError(f"its texts hold a control token, half of a surrogate pair, or more than {LONGEST} bytes")
    return given, event


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = Parser("harkd.recognize", "Name the activity behind each sensor event as it happens.")
    parser.add_argument("--model", required=True, help="a folder or a hub id")
    parser.add_argument("--adapter", help="a LoRA adapter of the model")
    parser.add_argument("--home", required=True, help="a home.json, its folder, or READER:PATH")
    parser.add_argument("--window", type=int, default=10, help="events labelled together")
    parser.add_argument("--max-wait", type=float, default=60.0, metavar="SECONDS", help="longest wait of an event for its window to fill")
    parser.add_switch("--thinking", None, "reason before the answer; as the adapter was trained, else no")
    parser.add_argument("--reasoning", action="store_true", help="tell the reasoning too")
    parser.add_argument("--out", metavar="FILE", help="append the answers there, and go on behind those that it holds")
    parser.add_switch("--rules", True, "put the rules for ambiguous cases into the prompt")
    add_model_arguments(parser)
    add_sampling_arguments(parser, guided=False)  # answers always are
    args = parser.parse_args(argv)
    parser.at_least_one(args, "window", "batch", "cache_tokens")
    check_wait(args.max_wait)  # before the model is loaded
    thinking = live_mode(args.adapter, args.thinking)
    if args.temperature is None and not thinking:
        args.temperature = 0.0
    how = {"thinking": thinking, "sampling": sampling_of(args, thinking), "window": args.window, "rules": args.rules, "dtype": args.dtype}
    answered, writer = _go_on(Path(args.out)) if args.out else ((), None)
    recognizer = Recognizer.load(args.model, args.adapter, args.home, **how, machine=machine_of(args))
    write = writer.append if writer else lambda told: print(json.dumps(told), flush=True)
    return serve(recognizer, sys.stdin.buffer, write, args.max_wait, args.reasoning, answered)


def _go_on(path: Path) -> tuple[Iterator[dict[str, Any]], JsonLinesWriter]:
    """The answers that a file holds, and what appends to it. UserError where it holds something else, which stays as it is."""
    try:
        for number, told in read_json_lines(path) if path.is_file() else ():
            if "activity" not in told:
                raise UserError(f"{path}, line {number} is no answer of harkd.recognize: name another file with --out")
        writer = JsonLinesWriter(path)  # before the answers are read: it cuts a torn line off
        hold(path)  # until this process ends
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written: {error.strerror}") from None
    return (told for _, told in read_json_lines(path)), writer


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    try:
        code = enter("harkd.recognize", _run, argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        return 0


if __name__ == "__main__":
    ended = main()
    sys.stderr.flush()
    os._exit(ended)  # at once: the thread that reads ahead may hold stdin, which Python would wait for
