r"""Text to token ids and back, and a training example as ids with its mask.

The tokenizer is the model's own tokenizer.json, run by the `tokenizers` library: NFC, Qwen3's split into words, byte-level BPE. Special
tokens in a text (`<|im_start|>`, `<think>`, ...) become their one id; nothing is ever added. Since bytes are the alphabet, a character may
be spread over several tokens: decode whole completions, never token by token.

A training example is tokenised in three parts, each apart, as at inference, where the third is sampled:

    prefix      <|im_start|>system\n ... <|im_end|>\n<|im_start|>     shared by all windows of a home
    prompt      user\n ... <|im_end|>\n<|im_start|>assistant\n       of this window
    completion  <think>\n ... </think>\n\n ... <|im_end|>            the supervised part

With thinking off the empty think block `<think>\n\n</think>\n\n` ends the prompt, and the completion is the answer alone.
The first cut is at a special token, and so is the second with thinking on: the parts tokenised apart equal the whole tokenised at once.
With thinking off they do not if the answer begins with white space that the "\n\n" before it would absorb: apart is then what counts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from harkd.errors import UserError
from harkd.qwen3 import template
from harkd.qwen3.hub import TOKENIZER_FILES, resolve

REQUIRED = (template.START, template.END, template.OPEN, template.CLOSE)
Span = tuple[int, int]


class Tokenizer:
    """`vocab_size` is the highest id + 1 (the model's embedding may have more rows); `stop_ids` end a completion."""

    chat = staticmethod(template.chat)

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()  # a tokenizer.json may bring settings for batches; ours is one whole text at a time
        backend.no_padding()
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        ids = [backend.token_to_id(token) for token in (template.END, "<|endoftext|>")]
        self.stop_ids = tuple(id for id in ids if id is not None)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of every token, added ones too."""
        return self._backend.get_vocab(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole completion, special tokens kept; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids, and for each the (start, end) of the characters of `text` that it was made from, in part or wholly.

        Tokens that share a character all span it. What NFC joins or reorders (e + U+0301) is spanned as one.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        if unicodedata.is_normalized("NFC", text):
            return encoding.ids, encoding.offsets
        runs = [run for run in _nfc_runs(text) for _ in range(*run)]  # of each character
        return encoding.ids, [(runs[start][0], runs[end - 1][1]) for start, end in encoding.offsets]


def _nfc_runs(text: str) -> Iterator[Span]:
    """Cut `text` into the shortest stretches that NFC rewrites independently of each other.

    The library's offsets name only the first character of such a stretch ("e" of e + U+0301).
    """
    start = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or _is_nfc_boundary(text[start:i], text[i]):
            yield start, i
            start = i


def _is_nfc_boundary(run: str, char: str) -> bool:
    if unicodedata.combining(unicodedata.normalize("NFD", char)[0]):
        return False  # a mark: it may be reordered among the others of its run
    nfc = unicodedata.normalize("NFC", run + char)
    return nfc == unicodedata.normalize("NFC", run) + unicodedata.normalize("NFC", char)  # else it composes (Hangul)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read `folder`/tokenizer.json; UserError if it is missing, unreadable, or lacks a special token of the chat template."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has no tokenizer.json: name the folder of a Qwen3 model")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{path} is not a readable tokenizer ({error}): fetch it again") from error
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    absent = [token for token in REQUIRED if token not in added]
    if absent:
        raise UserError(f"{path} lacks the special tokens {', '.join(absent)}: take the tokenizer of a Qwen3 model")
    return Tokenizer(backend)


def load_tokenizer(ref: str | Path) -> Tokenizer:
    """The tokenizer of a model named by a local folder or a hub id."""
    return read_tokenizer(resolve(ref, TOKENIZER_FILES))


@dataclass(frozen=True)
class Example:
    """One training example: the home's shared prefix, then the example's own tokens and which of them are supervised (as targets)."""

    prefix: list[int]
    ids: list[int]
    mask: list[bool]


def render_example(tokenizer: Tokenizer, messages: Sequence[template.Message], *, thinking: bool, unscored: Sequence[Span] = ()) -> Example:
    """Render and tokenise a conversation whose last turn, the assistant's, is to be learnt, as laid out at the top of this file.

    `unscored` are character spans of the last turn's content that are not learnt: every token that overlaps one is masked.
    ValueError if the last turn is not the assistant's or does not continue the prompt (reasoning with thinking off);
    UserError if nothing but the end of the turn would be learnt.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("the last message of a training example is the assistant's")
    prompt = template.chat(messages[:-1], thinking=thinking, generation_prompt=True)
    whole = template.chat(messages).removesuffix("\n")
    opening = prompt + f"{template.OPEN}\n" if thinking else prompt
    if not whole.startswith(opening):
        raise ValueError(f"the assistant's turn does not continue the prompt with thinking {'on' if thinking else 'off'}")
    prefix, rest = template.split_prefix(prompt)
    completion = whole.removeprefix(prompt)
    content_at = len(completion) - len(template.END) - len(messages[-1]["content"])  # the content's end is always rendered as it is
    hidden = [(content_at + start, content_at + end) for start, end in unscored]
    prompt_ids = tokenizer.encode(rest)
    ids, spans = tokenizer.encode_spans(completion)
    mask = [not any(max(start, a) < min(end, b) for a, b in hidden) for start, end in spans]
    if not any(mask[:-1]):
        raise UserError("a training example has no supervised token: its answer is empty or wholly unscored")
    return Example(tokenizer.encode(prefix), prompt_ids + ids, [False] * len(prompt_ids) + mask)
