"""Door 1: a teacher reads windows of sensor events, reasons, and names the activity behind each event; its answers are kept as traces.

    python -m harkd.generate --model Qwen/Qwen3-32B --data marble:PATH --out runs/traces
    python -m harkd.generate                           (nano-teacher, which ships with harkd, in a simulated home)

One trace per window and sample, appended as it is finished: a killed run goes on where it stopped. A teacher that does not fit here can run
anywhere: `--export-prompts FILE` writes its prompts as an OpenAI-style batch, `--import-completions FILE` reads its answers back. One that
fits on N GPUs together runs by `torchrun --nproc-per-node N -m harkd.generate --tensor-parallel N`; a multiple of N processes makes several
teams of N, which share the windows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harkd.doors import (
    DEFAULT_RUNS, SIMULATED, TEACHER, Parser, RunFolder, add_model_arguments, add_sampling_arguments, digests, enter, guiding_of,
    machine_of, sampling_of,
)  # fmt: skip
from harkd.errors import UserError
from harkd.homes.answer import ANSWER_FORM
from harkd.homes.dataset import Dataset, ReadOptions, add_data_arguments, read, read_options
from harkd.homes.events import Window
from harkd.homes.prompt import TEMPLATE_VERSION, prompt
from harkd.recognition import (
    Guiding, Machine, check_fit, completions, first_windows, load_generator, mode, probabilities, read_answer, request,
)  # fmt: skip
from harkd.sampling.request import Sampling, recommended

if TYPE_CHECKING:
    from harkd.distill.traces import Trace
    from harkd.distributed import World

FILES = ("traces.jsonl", "prompts.jsonl")


@dataclass(frozen=True)
class GenerateSettings:
    """What to generate. `model` is a folder or hub id; `limit` counts windows."""

    model: str
    data: str
    out: str
    adapter: str | None = None
    split: str = "train"
    samples: int = 1
    thinking: bool = True
    rules: bool = True
    limit: int | None = None
    sampling: Sampling | None = None  # what Qwen3 recommends with or without reasoning
    options: ReadOptions = ReadOptions()
    dtype: str | None = None
    import_completions: str | None = None
    guiding: Guiding = Guiding()

    def __post_init__(self) -> None:
        if self.sampling is None:
            object.__setattr__(self, "sampling", recommended(self.thinking))


def generate(settings: GenerateSettings, *, machine: Machine = Machine(), overwrite: bool = False) -> dict[str, Any]:
    """Write a trace for every window and sample into `settings.out`; continue what is there.

    Returns counts: traces wanted and written, correct (agreement 1), incomplete (an event without a label); of several processes the first
    alone. Raises UserError for a mistake in the settings.
    """
    from tqdm import tqdm

    from harkd.distill.traces import TraceWriter
    from harkd.distributed import join

    mode(settings.adapter, settings.thinking)
    dataset = read(settings.data, settings.options)
    wanted = {name: value for name, value in asdict(settings).items() if name != "import_completions"}  # answers may come in several files
    inputs = digests([] if settings.import_completions else [settings.model], [settings.adapter], data=[settings.data])
    folder = RunFolder(settings.out, "generate", wanted, overwrite, FILES, inputs)
    if folder.result is not None:
        return folder.result
    total = settings.samples * sum(1 for _ in first_windows(dataset, settings.split, settings.limit))
    with join(machine.device) as world:
        team = world.team(machine.tensor_parallel)
        teams, teacher = world.size // team.size, partial(_generated, machine=replace(machine, device=world.device), team=team)
        answering = (_imported if settings.import_completions else teacher)(settings, dataset)
        if world.rank == 0:
            folder.begin()
        world.sum([0])  # the folder is there
        with TraceWriter(folder.path) as writer:
            work = _work(settings, dataset, frozenset(writer.done))
            world.sum([0])  # nobody writes before all know what is missing
            with tqdm(total=total, initial=len(writer.done), unit="trace", file=sys.stderr, disable=world.rank > 0) as progress:
                counts = Counter[str]()
                for window, answer in answering(islice(work, world.rank // team.size, None, teams)):
                    if team.rank == 0:
                        writer.write(_trace(settings, dataset, window, answer))
                        progress.update(teams)  # the others are about as far
                        counts.update(answer.tokens)
        asked, written = map(int, world.sum([counts["prompt"], counts["completion"]]))  # of all, who have written
    if world.rank:
        return {}
    result = _summary(settings, folder.path, total)
    return folder.finish(result, {"prompt_tokens": asked, "completion_tokens": written}, complete=result["traces"] >= total)


@dataclass(frozen=True)
class _Written:
    """What a teacher wrote for one window and sample, wherever it ran."""

    sample: int
    text: str
    finish_reason: str
    tokens: dict[str, int]
    probabilities: list[dict[str, float]] | None = None


Work = Iterable[tuple[Window, int]]  # windows and samples that lack a trace
Answering = Callable[[Work], Iterator[tuple[Window, _Written]]]


def _work(settings: GenerateSettings, dataset: Dataset, done: Set[tuple[str, int]]) -> Iterator[tuple[Window, int]]:
    for window in first_windows(dataset, settings.split, settings.limit):
        for sample in range(settings.samples):
            if (window.id, sample) not in done:
                yield window, sample


def _generated(settings: GenerateSettings, dataset: Dataset, machine: Machine, team: World) -> Answering:
    """Load the teacher, to be run here, on many windows at a time, or this process's part of it."""
    ask = partial(request, thinking=settings.thinking, sampling=settings.sampling, rules=settings.rules, guiding=settings.guiding)
    windows = first_windows(dataset, settings.split, settings.limit)
    check_fit(settings.model, (ask(dataset.home(window.home), window) for window in windows), machine)
    generator = load_generator(settings.model, settings.adapter, settings.dtype, machine, team)

    def answering(work: Work) -> Iterator[tuple[Window, _Written]]:
        asked = ((window, ask(dataset.home(window.home), window, sample=sample)) for window, sample in work)
        for window, done in completions(generator, asked):
            tokens = {"prompt": done.prompt_tokens, "completion": len(done.ids)}
            labels = dataset.home(window.home).label_names
            yield window, _Written(done.request.sample, done.text, done.finish_reason, tokens, probabilities(done, labels))

    return answering


def _imported(settings: GenerateSettings, dataset: Dataset) -> Answering:
    """Read a teacher's answers from a file; how many prompts it leaves without an answer is told."""
    from harkd.distill.batch_file import read_completions

    file = settings.import_completions
    completions = read_completions(Path(file))
    if not any((window.id, sample) in completions for window, sample in _work(settings, dataset, set())):
        raise UserError(f"{file} answers none of the prompts: give --data, --split, --samples and --limit as with --export-prompts")

    def answering(work: Work) -> Iterator[tuple[Window, _Written]]:
        missing = 0
        for window, sample in work:
            found = completions.get((window.id, sample))
            if found is None:
                missing += 1
            else:
                yield window, _Written(sample, *found)
        if missing:
            print(f"{file} holds no answer to {missing} of the prompts; import another file to go on", file=sys.stderr)

    return answering


def _trace(settings: GenerateSettings, dataset: Dataset, window: Window, written: _Written) -> Trace:
    from harkd.distill.traces import Trace, agreement
    from harkd.qwen3.template import split_completion

    home = dataset.home(window.home)
    answer = read_answer(written.text, written.finish_reason, window, home.label_names)
    truth = [list(event.labels) for event in window.events]
    reasoning, content = split_completion(written.text)
    messages = [*prompt(home, window, rules=settings.rules), {"role": "assistant", "reasoning_content": reasoning, "content": content}]
    return Trace(
        data=settings.data, home=window.home, group=window.group, recording=window.recording, window=window.id, sample=written.sample,
        labels=list(home.label_names), messages=messages, answer=list(answer.labels), causes=answer.causes, truth=truth,
        agreement=agreement(answer.labels, truth), tokens=written.tokens, finish_reason=written.finish_reason, seed=settings.sampling.seed,
        model=settings.model, thinking=settings.thinking, template=TEMPLATE_VERSION, answer_form=ANSWER_FORM,
        guided=settings.guiding.guided, probabilities=written.probabilities,
    )  # fmt: skip


def _summary(settings: GenerateSettings, folder: Path, total: int) -> dict[str, Any]:
    """Show one trace, and count what the folder holds, from the file itself: a continued run counts all of it."""
    from harkd.distill.traces import read_traces

    traces = correct = incomplete = 0
    causes: Counter[str] = Counter()
    for trace in read_traces(folder):
        if not traces:
            user, assistant = trace.messages[-2:]
            print(f"{trace.window}, and what {settings.model} wrote about it:\n\n{user['content']}\n")
            print(f"{assistant['reasoning_content']}\n\n{assistant['content']}\n")
        traces += 1
        correct += trace.agreement == 1
        incomplete += None in trace.answer
        causes.update(trace.causes)
    told = f"{correct} agree with the truth on every scored event, {incomplete} leave an event without a label"
    print(f"{traces} of {total} traces in {folder}: {told}", file=sys.stderr)
    return {
        "out": settings.out, "model": settings.model, "wanted": total, "traces": traces, "correct": correct, "incomplete": incomplete,
        "causes": dict(causes),
    }  # fmt: skip


def export_prompts(settings: GenerateSettings, file: Path) -> dict[str, Any]:
    """Write the prompts as an OpenAI-style batch file: of all windows and samples, but for those whose traces `settings.out` holds."""
    from harkd.distill.batch_file import write_prompts
    from harkd.distill.traces import TRACES, read_traces

    dataset = read(settings.data, settings.options)
    known = settings.out and (Path(settings.out) / TRACES).exists()
    done = {(trace.window, trace.sample) for trace in read_traces(Path(settings.out))} if known else set()
    work = (
        (window, sample, prompt(dataset.home(window.home), window, rules=settings.rules))
        for window, sample in _work(settings, dataset, done)
    )
    try:
        count = write_prompts(file, work, settings.model, settings.thinking, settings.sampling)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return {"exported": count, "file": str(file)}


def _parser() -> Parser:
    parser = Parser("harkd.generate", "A teacher reasons about windows of sensor events; its answers are kept as traces.")
    parser.add_argument("--model", default=TEACHER, help="the teacher: a folder in Hugging Face's layout or a hub id")
    parser.add_argument("--adapter", help="a LoRA adapter for it, in PEFT's layout")
    parser.add_argument("--data", default=SIMULATED, help="READER:PATH, for instance marble:PATH")
    parser.add_argument("--split", default="train", help="train, validation, test or all")
    parser.add_argument("--out", help=f"the run's folder; {DEFAULT_RUNS}/traces where none is named")
    parser.add_argument("--samples", type=int, default=1, help="answers per window")
    parser.add_switch("--thinking", None, "reason before the answer; as the adapter was trained, else yes")
    parser.add_switch("--rules", True, "put the rules for ambiguous cases into the prompt")
    parser.add_argument("--limit", type=int, help="only the first so many windows")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds a run")
    parser.add_argument("--export-prompts", metavar="FILE", help="write the prompts that --out has no traces of as a batch file, and stop")
    parser.add_argument("--import-completions", metavar="FILE", help="take the answers from a batch's output file; from others later")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="processes of torchrun that hold the model together")
    return parser


def _run(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.export_prompts and args.import_completions:
        parser.error("--export-prompts writes questions and --import-completions reads answers: give one of them")
    here = {"--guided": args.guided, "--max-thinking": args.max_thinking is not None, "--adapter": args.adapter}
    if any(here.values()) and (args.export_prompts or args.import_completions):
        parser.error(f"{next(filter(here.get, here))} is for a model that runs here")
    parser.at_least_one(args, "samples", "limit", "batch", "cache_tokens", "tensor_parallel")
    thinking = mode(args.adapter, args.thinking)
    out = args.out or ("" if args.export_prompts else f"{DEFAULT_RUNS}/traces")
    settings = GenerateSettings(
        model=args.model, adapter=args.adapter, data=args.data, out=out, split=args.split, samples=args.samples,
        thinking=thinking, rules=args.rules, limit=args.limit, sampling=sampling_of(args, thinking), options=read_options(args),
        dtype=args.dtype, import_completions=args.import_completions, guiding=guiding_of(args),
    )  # fmt: skip
    if args.export_prompts:
        return export_prompts(settings, Path(args.export_prompts))
    return generate(settings, machine=machine_of(args), overwrite=args.overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence for a user's mistake."""
    return enter("harkd.generate", _run, argv)


if __name__ == "__main__":
    sys.exit(main())
