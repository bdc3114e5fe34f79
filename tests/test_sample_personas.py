"""The persona texts are whole and of like length, and no wording returns."""

import json
import re
from collections import Counter, defaultdict
from itertools import product
from statistics import mean

import pytest

from llama_dialogue.core.paths import sample_dir

TYPES = {"".join(letters) for letters in product("EI", "SN", "TF", "JP")}


def read(name):
    return [json.loads(line) for line in (sample_dir() / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def situations():
    return read("personas.jsonl")


def test_every_situation_has_an_answer_of_each_type(situations):
    assert len(situations) == len({s["id"] for s in situations}) == 48
    assert Counter(Counter(s["topic"] for s in situations).values()) == {4: 12}
    assert all(set(s["answers"]) == TYPES for s in situations)


def test_answers_are_of_like_length_and_no_wording_returns(situations):
    words, seen = defaultdict(list), defaultdict(set)
    for situation in situations:
        for kind, answer in situation["answers"].items():
            words[kind].append(len(answer.split()))
            told = re.findall(r"[\w']+", answer.lower())
            for start in range(len(told) - 5):
                seen[tuple(told[start : start + 6])].add(answer)
    lengths = [mean(own) for own in words.values()]
    assert max(lengths) <= 1.1 * min(lengths)
    assert all(28 <= n <= 42 for own in words.values() for n in own)
    assert max(len(answers) for answers in seen.values()) <= 3


def test_statements_are_balanced(situations):
    statements = read("questionnaire.jsonl")
    counts = Counter((s["axis"], s["agree"]) for s in statements)
    assert counts == {(axis, pole): 8 for axis in ("EI", "SN", "TF", "JP") for pole in axis}
    texts = [text for s in statements for text in (*s["wordings"], *s["opposite"])]
    assert len(set(texts)) == 4 * len(statements) == 256
    further = read("open_situations.jsonl")
    assert len({s["id"] for s in further}) == 60 and len({s["topic"] for s in further}) >= 12
    assert not {s["situation"] for s in further} & {s["situation"] for s in situations}
