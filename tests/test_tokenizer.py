"""The tokenizer on a tiny and on the real vocabulary, and training examples as ids with their masks."""

import json
import random
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from harkd.errors import UserError
from harkd.qwen3.template import chat
from harkd.qwen3.tokenizer import Tokenizer, load_tokenizer, read_tokenizer, render_example
from tests.helpers import QWEN3, needs_qwen3
from tests.tiny import tiny_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", params=["tiny", pytest.param("real", marks=needs_qwen3)])
def folder(request, tiny_folder):
    return tiny_folder if request.param == "tiny" else QWEN3


@pytest.fixture(scope="module")
def tokenizer(folder):
    return read_tokenizer(folder)


def nfc(text):
    return unicodedata.normalize("NFC", text)


def is_mark(char):
    return unicodedata.combining(unicodedata.normalize("NFD", char)[0]) > 0


# characters that NFC decomposes, reorders or composes, as Unicode 9 (which the library knows) has them, and plain ones
REWRITTEN = [chr(c) for c in range(0x80, 0x30000) if nfc(chr(c)) != chr(c)]
MARKS = [chr(c) for c in (*range(0x300, 0x370), *range(0x591, 0x5B0), 0x3099, 0x93C, 0x9BE)]
HANGUL = [chr(c) for c in (*range(0x1100, 0x1113), *range(0x1161, 0x1176), *range(0x11A8, 0x11C3), 0xAC00, 0xAC01)]
PLAIN = list("aeoKc <>=[\"'\n\t 1字é😀\u200d🏽\u09c7") + ['"activity"', "COOKING", " \n", "\n\n", "\r\n"]


def random_text(rng, alphabets=(REWRITTEN, MARKS, HANGUL, PLAIN, PLAIN, PLAIN)):
    """Pieces between special tokens; no mark directly after one, which NFC of the whole would join to its `>`."""
    pieces = []
    for _ in range(rng.randrange(1, 4)):
        pieces.append("x" + "".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randrange(0, 9))))
        pieces.append(rng.choice(["", *SPECIAL]))
    return "".join(pieces)


def conversation(content, reasoning=""):
    user = '[{"event_id": 1, "time": "07:22:45", "description": "kitchen fridge opened"}]'
    last = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    return [{"role": "system", "content": "You name activities at home."}, {"role": "user", "content": user}, last]


def answer(*labels):
    return json.dumps([{"event_id": i, "activity": label} for i, label in enumerate(labels, 1)], ensure_ascii=False)


def test_sizes_and_stops_of_the_tiny_vocabulary(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    entries = json.loads((tiny_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == max(*entries["model"]["vocab"].values(), *(t["id"] for t in entries["added_tokens"])) + 1 < 1000
    assert [tokenizer.decode([id]) for id in tokenizer.stop_ids] == ["<|im_end|>", "<|endoftext|>"]


@needs_qwen3
def test_known_ids_of_the_real_vocabulary():
    tokenizer = read_tokenizer(QWEN3)
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.stop_ids == (151_645, 151_643)
    assert tokenizer.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert tokenizer.encode("<|im_start|>\n<think>\n\n</think>\n\n<|im_end|>") == [151644, 198, 151667, 271, 151668, 271, 151645]


def test_vocabulary_with_a_gap_and_without_stops():
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 7}, merges=[])))
    assert tokenizer.vocab_size == 8
    assert tokenizer.stop_ids == ()


def test_batch_settings_of_the_file_are_put_aside(tiny_folder, tmp_path):
    backend = tokenizers.Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(backend.encode("x " * 20).ids) == 50
    assert read_tokenizer(tmp_path).encode("x " * 20) == read_tokenizer(tiny_folder).encode("x " * 20)


def test_decode_gives_back_nfc(tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == nfc(text)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(max_codepoint=0x2FF), max_size=30))
def test_any_text_without_marks_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_character_of_several_tokens_needs_them_all(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    ids = tokenizer.encode("🏽")
    assert len(ids) == 4
    assert tokenizer.decode(ids) == "🏽"
    assert "".join(tokenizer.decode([id]) for id in ids) == "\ufffd" * 4


def test_ids_are_those_of_tokenizers_and_transformers(tokenizer, folder):
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(300)] + ["", " ", chat(conversation(answer("COOKING"), "because"))]
    for text in texts:
        assert tokenizer.encode(text) == backend.encode(text).ids == peer(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == peer.decode(peer(text)["input_ids"], clean_up_tokenization_spaces=False)
    for thinking in (True, False) if peer.chat_template else ():
        messages = conversation("")[:-1]
        prompt = peer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=thinking, tokenize=False)
        assert tokenizer.encode(tokenizer.chat(messages, thinking=thinking, generation_prompt=True)) == peer(prompt)["input_ids"]


# Character spans


def expected_spans(tokenizer, ids, text):
    """From the tokens' bytes alone: each byte of the NFC text belongs to a stretch of `text`, a token spans those of its bytes."""
    cuts = [0, *(i for i in range(1, len(text)) if nfc(text[:i]) + nfc(text[i:]) == nfc(text) and not is_mark(text[i])), len(text)]
    if nfc(text) == text:
        cuts = list(range(len(text) + 1))
    owners = [(a, b) for a, b in zip(cuts, cuts[1:]) for _ in nfc(text[a:b]).encode()]
    spans, at = [], 0
    for id in ids:
        end = at + len(tokenizer._backend.id_to_token(id))  # one character of the token's name for each of its bytes
        spans.append((owners[at][0], owners[end - 1][1]))
        at = end
    assert at == len(owners)
    return spans


@pytest.mark.parametrize("normal", [True, False])
def test_spans_are_those_of_the_bytes(tokenizer, normal):
    rng = random.Random(2)
    for _ in range(500):
        text = random_text(rng)
        text = nfc(text) if normal else text
        ids, spans = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        assert spans == expected_spans(tokenizer, ids, text), text


def test_spans_by_hand(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    assert tokenizer.encode_spans("x🏽<think>y")[1] == [(0, 1)] + [(1, 2)] * 4 + [(2, 9), (9, 10)]
    assert tokenizer.encode_spans("xe\u0301y")[1] == [(0, 1), (1, 3), (1, 3), (3, 4)]  # é is two bytes
    assert tokenizer.encode_spans("xe\u0301\u0323y")[1] == [(0, 1)] + [(1, 4)] * 5 + [(4, 5)]  # reordered: ẹ (3 bytes) + U+0301 (2)
    assert tokenizer.encode_spans("\u1100\u1161\u11a8y")[1] == [(0, 3)] * 3 + [(3, 4)]  # one Hangul syllable
    assert tokenizer.encode_spans("") == ([], [])


# Training examples


def supervised(tokenizer, example):
    return tokenizer.decode([id for id, on in zip(example.ids, example.mask) if on])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("with_system", [True, False])
def test_example_continues_the_prompt_of_inference(tokenizer, thinking, with_system):
    messages = conversation(answer("COOKING", "WATCHING_TV"), "The stove.\n\nSo." if thinking else "")
    messages = messages if with_system else messages[1:]
    example = render_example(tokenizer, messages, thinking=thinking)
    prompt = chat(messages[:-1], thinking=thinking, generation_prompt=True)
    head = "<|im_start|>system\nYou name activities at home.<|im_end|>\n<|im_start|>" if with_system else ""
    completion = ("<think>\nThe stove.\n\nSo.\n</think>\n\n" if thinking else "") + messages[-1]["content"] + "<|im_end|>"
    assert example.prefix == tokenizer.encode(head)
    assert example.ids == tokenizer.encode(prompt[len(head) :]) + tokenizer.encode(completion)
    assert len(example.mask) == len(example.ids)
    own_prompt = [id for id, on in zip(example.ids, example.mask) if not on]
    assert example.prefix + own_prompt == tokenizer.encode(prompt)  # as inference encodes it
    assert supervised(tokenizer, example) == completion
    assert example.mask == sorted(example.mask)  # the prompt first


def test_parts_equal_the_whole(tokenizer):
    rng = random.Random(3)
    for _ in range(200):
        reasoning = random_text(rng).replace("<think>", "").replace("</think>", "")
        content = random_text(rng).replace("<think>", "").replace("</think>", "")
        for messages, thinking in ((conversation(content, reasoning), True), (conversation(answer("COOKING", content)), False)):
            example = render_example(tokenizer, messages, thinking=thinking)
            assert example.prefix + example.ids == tokenizer.encode(chat(messages).removesuffix("\n"))


def test_where_the_whole_differs_the_parts_count(tokenizer):
    content = "    \n[]"  # the real vocabulary has a token for "\n\n    \n"
    messages = conversation(content)
    example = render_example(tokenizer, messages, thinking=False)
    prompt = chat(messages[:-1], thinking=False, generation_prompt=True)
    apart = tokenizer.encode(prompt) + tokenizer.encode(content + "<|im_end|>")
    assert example.prefix + example.ids == apart
    assert tokenizer.decode(apart) == chat(messages).removesuffix("\n")
    whole = tokenizer.encode(chat(messages).removesuffix("\n"))
    assert (apart != whole) == (tokenizer.vocab_size == 151_669)  # the tiny one has none


@pytest.mark.parametrize("thinking", [True, False])
def test_unscored_labels_are_masked(tokenizer, thinking):
    labels = ["ЖЩ", "A", "字🏽", "e\u0301\u0323", "é"]
    content = answer(*labels)
    spans = [(start := content.index(f'"{label}"') + 1, start + len(label)) for label in labels if label != "A"]
    example = render_example(tokenizer, conversation(content, "é" if thinking else ""), thinking=thinking, unscored=spans)
    whole = render_example(tokenizer, conversation(content, "é" if thinking else ""), thinking=thinking)
    assert (example.prefix, example.ids) == (whole.prefix, whole.ids)
    masked = tokenizer.decode([id for id, a, b in zip(whole.ids, whole.mask, example.mask) if a and not b])
    # a blank or quote before a label may be part of its first token
    assert masked.replace('"', "").replace(" ", "") == nfc("ЖЩ字🏽e\u0301\u0323é")
    assert supervised(tokenizer, example).count("é") == thinking  # the reasoning stays
    assert supervised(tokenizer, example).startswith("<think>" if thinking else '[{"event_id": 1, "activity":')
    assert supervised(tokenizer, example).endswith("}]<|im_end|>")


def test_a_token_that_only_overlaps_is_masked(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    content = answer("COOKING")
    ids, spans = tokenizer.encode_spans(content + "<|im_end|>")
    quote = content.index('"COOKING')
    assert next(end - start for start, end in spans if start <= quote < end) > 1  # the quote is joined to the label
    at = (quote + 1, quote + 2)
    example = render_example(tokenizer, conversation(content), thinking=False, unscored=[at])
    assert example.mask[-len(ids) :] == [end <= at[0] or start >= at[1] for start, end in spans]
    assert sum(example.mask) == len(ids) - 1
    empty = render_example(tokenizer, conversation(content), thinking=False, unscored=[(quote + 1, quote + 1)])
    assert sum(empty.mask) == len(ids)


@pytest.mark.parametrize("content", ["\n\n[字]", "R</think>\n\n[字]", "<think>\nR\n</think>\n\n[字]"])
def test_spans_refer_to_the_content_as_given(tiny_folder, content):
    tokenizer = read_tokenizer(tiny_folder)
    messages = conversation(content)
    del messages[-1]["reasoning_content"]
    at = content.index("字")
    example = render_example(tokenizer, messages, thinking=True, unscored=[(at, at + 1)])
    reasoning = "R" if "R" in content else ""
    assert supervised(tokenizer, example) == f"<think>\n{reasoning}\n</think>\n\n[]<|im_end|>"


def test_what_is_no_example_is_refused(tiny_folder):
    tokenizer = read_tokenizer(tiny_folder)
    messages = conversation("[]", "R")
    for bad in ([], messages[:-1], messages[-1:]):
        with pytest.raises(ValueError):
            render_example(tokenizer, bad, thinking=True)
    with pytest.raises(ValueError, match="thinking off"):
        render_example(tokenizer, messages, thinking=False)
    messages[1]["content"] = "<tool_response></tool_response>"  # no query, so no think block
    with pytest.raises(ValueError, match="thinking on"):
        render_example(tokenizer, messages, thinking=True)
    for content, unscored in (("", []), ("[]", [(0, 2)])):
        with pytest.raises(UserError, match="no supervised token"):
            render_example(tokenizer, conversation(content), thinking=False, unscored=unscored)


def test_users_mistakes(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no tokenizer.json"):
        read_tokenizer(tmp_path / "absent")
    whole = (tiny_folder / "tokenizer.json").read_text(encoding="utf-8")
    for text in ("", "{}", whole[: len(whole) // 2]):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="not a readable tokenizer"):
            read_tokenizer(tmp_path)
    other = json.loads(whole)
    other["added_tokens"] = [token for token in other["added_tokens"] if token["content"] not in ("<think>", "<|im_end|>")]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks the special tokens <\|im_end\|>, <think>:"):
        read_tokenizer(tmp_path)


def test_load_by_folder(tiny_folder):
    assert load_tokenizer(str(tiny_folder)).encode("kitchen fridge") == read_tokenizer(tiny_folder).encode("kitchen fridge")
    with pytest.raises(UserError):
        load_tokenizer(str(tiny_folder / "absent"))
