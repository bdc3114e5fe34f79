"""The sample corpus is varied and balanced enough: what its data card promises is counted here."""

import json
import re
from collections import Counter, defaultdict

import pytest

from llama_dialogue.core.dialogues import load_corpus
from llama_dialogue.core.paths import sample_dir
from llama_dialogue.core.targets import ACTS


def words(text):
    return re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split()


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("sample")


@pytest.fixture(scope="module")
def turns(corpus):
    return [turn for dialogue in corpus for turn in dialogue.turns]


def test_size(corpus, turns):
    assert len(corpus) >= 240 and len(turns) >= 1600 and not corpus.skipped
    assert len({dialogue.topic for dialogue in corpus}) == 10
    lengths = Counter(dialogue.topic for dialogue in corpus)
    assert min(lengths.values()) >= 20


def test_labels(turns):
    acts, emotions = Counter(t.act for t in turns), Counter(t.emotion for t in turns)
    assert min(acts[act] for act in ACTS) >= 300
    assert min(emotions[e] for e in ("happiness", "sadness", "anger", "surprise")) >= 80
    assert min(emotions[e] for e in ("fear", "disgust")) >= 40
    assert None not in acts and None not in emotions


def test_the_data_card_counts_right(corpus, turns):
    card = (sample_dir() / "README.md").read_text(encoding="utf-8")
    counts = Counter(t.act for t in turns) + Counter(t.emotion for t in turns)
    told = {
        label: int(n.replace(",", "")) for label, n in re.findall(r"^\| (\w+) \| ([\d,]+) \|$", card, re.M)
    }
    assert told == counts
    assert f"{len(corpus)} two-person" in card and f"{len(turns):,} turns" in card


def test_ids_are_the_hash_of_the_turns(corpus):
    lines = (sample_dir() / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [dialogue.id for dialogue in corpus]


def test_no_longer_utterance_twice(turns):
    said = Counter(" ".join(words(t.text)) for t in turns if len(words(t.text)) >= 4)
    assert said.most_common(1)[0][1] == 1


def test_no_six_words_in_more_than_three_dialogues(corpus):
    places = defaultdict(set)
    for dialogue in corpus:
        for turn in dialogue.turns:
            tokens = words(turn.text)
            for i in range(len(tokens) - 5):
                places[tuple(tokens[i : i + 6])].add(dialogue.id)
    assert max(map(len, places.values())) <= 3


def test_turns_do_not_open_alike(turns):
    openings = Counter(tuple(words(t.text)[:3]) for t in turns)
    assert openings.most_common(1)[0][1] <= 0.03 * len(turns)


def test_ai_talk_is_labelled():
    rows = [
        json.loads(line) for line in (sample_dir() / "ai_talk.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    labels = Counter(row["label"] for row in rows)
    assert labels == {"ai": 100, "human": 100} and len({row["text"] for row in rows}) == 200
