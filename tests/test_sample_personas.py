"""The persona texts are whole and of like length, and no wording returns."""

import json
import re
from collections import Counter, defaultdict
from itertools import product
from statistics import mean

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

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


@pytest.mark.parametrize("place", range(4))
def test_neither_words_nor_length_give_an_axis_away(situations, place):
    texts = [answer for s in situations for answer in s["answers"].values()]
    poles = np.array([kind[place] in "ESTJ" for s in situations for kind in s["answers"]])
    groups = np.repeat(np.arange(len(situations)), 16)
    words = TfidfVectorizer(token_pattern=r"[\w']+|[?!]", sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
    told = cross_val_predict(model, texts, poles, cv=GroupKFold(12), groups=groups) == poles
    lengths = np.array([len(text.split()) for text in texts])
    by_length = [((lengths > cut) == poles).mean() for cut in range(28, 43)]
    print(f"bag of words {told.mean():.3f}, length {max(*by_length, 1 - min(by_length)):.3f}")
    assert told.mean() <= 0.75 and max(*by_length, 1 - min(by_length)) <= 0.55


def test_statements_are_balanced(situations):
    statements = read("questionnaire.jsonl")
    counts = Counter((s["axis"], s["agree"]) for s in statements)
    assert counts == {(axis, pole): 8 for axis in ("EI", "SN", "TF", "JP") for pole in axis}
    texts = [text for s in statements for text in (*s["wordings"], *s["opposite"])]
    assert len(set(texts)) == 4 * len(statements) == 256
    further = read("open_situations.jsonl")
    assert len({s["id"] for s in further}) == 60 and len({s["topic"] for s in further}) >= 12
    assert not {s["situation"] for s in further} & {s["situation"] for s in situations}


def test_questions_for_side_by_side_answers(situations):
    questions = read("side_questions.jsonl")
    assert Counter(q["topic"] for q in questions) == {"drugs": 7, "crime": 6, "grief": 7}
    asked = {q["situation"] for q in questions}
    others = {s["situation"] for s in [*situations, *read("open_situations.jsonl")]}
    assert len(asked) == len({q["id"] for q in questions}) == 20 and not asked & others
