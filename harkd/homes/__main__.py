"""What harkd reads from a data set, and what a model gets to see of it:   python -m harkd.homes READER:PATH

Prints the counts, what was repaired, left unscored or odd and why, and the prompt of the first training window; the last line is one JSON
object with the same counts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from harkd.doors import Parser, enter
from harkd.homes.dataset import Dataset, Report, add_data_arguments, read, read_options
from harkd.homes.prompt import TEMPLATE_VERSION, prompt

PROG = "python -m harkd.homes"


def main(argv: Sequence[str] | None = None) -> int:
    return enter(PROG, _run, argv)


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = Parser(PROG, "Tell what was read from a data set.")
    parser.add_argument("data", metavar="READER:PATH", help="for example marble:MARBLE/dataset")
    parser.add_argument("--tokenizer", metavar="REF", help="count the prompt's tokens: a model's folder or hub id")
    parser.add_argument("--no-rules", dest="rules", action="store_false", help="leave the rules for ambiguous events out of the prompt")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    dataset = read(args.data, read_options(args))
    report = dataset.survey()
    _print_report(dataset, report)
    tokens = _print_prompt(dataset, args.rules, args.tokenizer)
    return {"data": dataset.name, **asdict(report), "template": TEMPLATE_VERSION, "prompt_tokens": tokens}


def _print_report(dataset: Dataset, report: Report) -> None:
    """The counts, one line each."""
    unscored = report.events - report.scored
    print(f"data        {dataset.name}")
    left_out = f", {dataset.left_out} left out by --split-by {dataset.options.split_by}" if dataset.left_out else ""
    print(f"recordings  {report.recordings} in {report.groups} groups{left_out}")
    print(f"residents   {report.residents}")
    print(f"sensors     {report.sensors}")
    print(f"events      {report.events}: {report.scored} scored, {unscored} without a label on offer")
    never = {label: 0 for home in dataset.homes for label in home.label_names if label not in report.labels}
    for title in ("labels", "windows", "repaired", "unscored", "noticed"):
        counts = getattr(report, title) | (never if title == "labels" else {})
        print(f"{title:<10}  {'' if counts else 'nothing'}".rstrip())
        for name, count in counts.items():
            print(f"{count:>8}  {name}")


def _print_prompt(dataset: Dataset, rules: bool, tokenizer_ref: str | None) -> int | None:
    """Print the prompt of the first window, of the training side if there is one, and return its number of tokens if asked for."""
    window = next(dataset.folded()[0].windows("train"), None) or next(dataset.windows(), None)
    if window is None:
        print("prompt      none: there are no events")
        return None
    messages = prompt(dataset.home(window.home), window, rules=rules)
    print(f"prompt      of window {window.id}")
    for message in messages:
        print(f"\n--- {message['role']} ---\n{message['content']}")
    print()
    if tokenizer_ref is None:
        return None
    from harkd.qwen3.tokenizer import load_tokenizer  # only here: a look at the data needs no library

    tokenizer = load_tokenizer(tokenizer_ref)
    tokens = len(tokenizer.encode(tokenizer.chat(messages, generation_prompt=True)))
    own = [len(tokenizer.encode(message["content"])) for message in messages]
    print(f"tokens      {tokens} in the prompt: {own[0]} of the system message, {own[1]} of the window, the rest of the chat template")
    return tokens


if __name__ == "__main__":
    sys.exit(main())
