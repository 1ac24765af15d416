"""Guided requests, and what they should give: every branch computed anew by a model without a cache, from whole answers alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from harkd.homes.answer import Text, answer_shape, canonical
from harkd.sampling.request import Request, Sampling
from harkd.sampling.sampler import noise_key, sample, uniform
from tests.generator_cases import GREEDY, Tiny, request

LABELS = ("EATING", "COOK", "COOKING", "COOKING_WARM", 'say "hi", \\ then', "¿caña?", "漢字", "(x")
ROOM = replace(GREEDY, max_new_tokens=300)
WARM = Sampling(temperature=1.5, top_k=3, top_p=0.9, max_new_tokens=300, seed=4)


def shape(events: int, labels=LABELS) -> tuple:
    return tuple(part.text if isinstance(part, Text) else part.options for part in answer_shape(events, labels))


def guided(window: str, text: str, events: int, sampling: Sampling = ROOM, labels=LABELS, **changes) -> Request:
    """A request without reasoning, unless `changes` say so."""
    asked = request(window, text, sampling=sampling)
    prompt = asked.prompt + ("" if changes.get("thinking") else "<think>\n\n</think>\n\n")
    return replace(asked, prompt=prompt, answer=shape(events, labels), **changes)


def by_hand(tiny: Tiny, asked: Request, events: int, labels=LABELS) -> tuple[list[int], list[dict[int, float]], list[dict[int, float]]]:
    """(ids, probabilities along the way taken, probabilities of all options) without reasoning.

    At each token, those may follow with which the answer can go on that names some label for this event and the first for those behind it.
    """
    encode, written, chosen = tiny.tokenizer.encode, [], []
    prompt = encode(asked.prefix + asked.prompt)

    def branch(ids: list[int], whole: list[list[int]]) -> tuple[list[int], torch.Tensor]:
        allowed = sorted({other[len(ids)] for other in whole if other[: len(ids)] == ids and len(other) > len(ids)})
        with torch.no_grad():
            return allowed, tiny.model.logits(torch.tensor(prompt + ids))[-1, allowed]

    along, every = [], []
    for event in range(events):
        whole = [encode(canonical([*chosen, label, *[labels[0]] * (events - event - 1)])) for label in labels]
        exact = {}
        for option, ids in enumerate(whole):
            exact[option] = 1.0
            for end in range(len(ids)):
                if len({tuple(other[: end + 1]) for other in whole if other[:end] == ids[:end]}) > 1:
                    allowed, logits = branch(ids[:end], whole)
                    exact[option] *= logits.softmax(-1)[allowed.index(ids[end])].item()
        known, left = {}, list(range(len(labels)))
        at = len(written)
        while len(left) > 1:
            following = {whole[option][at] for option in left}
            if len(following) > 1:
                allowed, logits = branch(whole[left[0]][:at], [whole[option] for option in left])
                u = uniform(torch.tensor([noise_key(asked.sampling.seed, asked.window, asked.sample)]), torch.tensor([at]))
                token = allowed[sample(logits[None], asked.sampling, u)[0].item()]
                for other in following:
                    behind = [option for option in left if whole[option][at] == other]
                    if len(behind) == 1:
                        known[behind[0]] = exact[behind[0]]
                left = [option for option in left if whole[option][at] == token]
            at += 1
        chosen.append(labels[left[0]])
        written = encode(canonical([*chosen, *[labels[0]] * (events - event - 1)]))
        written = written[: at]
        along.append(known)
        every.append(exact)
    return encode(canonical(chosen)), along, every
