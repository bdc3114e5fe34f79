"""The sample corpus is varied and balanced enough: what its data card promises is counted here."""

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest

from llama_dialogue.attribute.defaults import default_head
from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.attribute.sample_corpus import read_second_labels
from llama_dialogue.core.dialogues import load_corpus
from llama_dialogue.core.models import ChatModel, tiny_chat_model
from llama_dialogue.core.paths import sample_dir
from llama_dialogue.core.records import RunRecord, results_dir
from llama_dialogue.core.targets import ACTS, EMOTIONS

FIRST = 343  # dialogues of the first edition, which stand first in the file and keep their ids
FIRST_SHA256 = "7925f1f6b553a67580920016ad345993d9776a702f022ece352e83cdabb13601"
MOST_ALIKE = 0.8  # cosine of the embeddings from which on two dialogues count as near-duplicates


def words(text):
    return re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split()


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("sample")


@pytest.fixture(scope="module")
def turns(corpus):
    return [turn for dialogue in corpus for turn in dialogue.turns]


def test_size(corpus, turns):
    assert len(corpus) >= 1000 and len(turns) >= 8000 and not corpus.skipped
    topics = Counter(dialogue.topic for dialogue in corpus)
    assert len(topics) == 10 and min(topics.values()) >= 60
    assert {2, 16} <= {len(dialogue.turns) for dialogue in corpus} <= set(range(2, 17))


def test_the_second_edition_has_short_turns(corpus):
    lengths = [len(turn.text.split()) for dialogue in corpus.dialogues[FIRST:] for turn in dialogue.turns]
    assert sum(length < 6 for length in lengths) >= 0.25 * len(lengths)


def test_the_first_edition_keeps_its_ids(corpus):
    ids = "\n".join(dialogue.id for dialogue in corpus.dialogues[:FIRST])
    assert hashlib.sha256(ids.encode()).hexdigest() == FIRST_SHA256


def test_labels(turns):
    acts, emotions = Counter(t.act for t in turns), Counter(t.emotion for t in turns)
    assert set(acts) == set(ACTS) and min(acts.values()) >= 1000
    assert set(emotions) == set(EMOTIONS)
    assert min(emotions.values()) >= 150
    assert min(emotions[e] for e in ("happiness", "sadness", "anger", "surprise")) >= 250
    assert 0.45 < emotions["no_emotion"] / len(turns) < 0.6


def test_splits_are_ten_percent_each(corpus):
    splits = Counter(dialogue.split for dialogue in corpus)
    assert all(0.07 < splits[name] / len(corpus) < 0.13 for name in ("validation", "test"))


def test_the_data_card_counts_right(corpus, turns):
    card = (sample_dir() / "README.md").read_text(encoding="utf-8")
    counts = Counter(t.act for t in turns) + Counter(t.emotion for t in turns)
    told = {
        label: int(n.replace(",", "")) for label, n in re.findall(r"^\| (\w+) \| ([\d,]+) \|$", card, re.M)
    }
    assert told == counts
    assert f"{len(corpus):,} two-person" in card and f"{len(turns):,} turns" in card


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


def test_no_two_dialogues_are_near_duplicates(corpus):
    record = RunRecord.load(results_dir() / "attribute" / "sample-corpus.json")
    assert record.inputs["data"]["sha256"] == corpus.sha256
    assert max(cosine for *_, cosine in record.details["closest"]) < MOST_ALIKE


def test_second_labels_belong_to_turns(corpus):
    found = read_second_labels(sample_dir() / "second_labels.jsonl", corpus.dialogues)
    assert len(found) == 400 == len({(dialogue.id, turn.text) for dialogue, turn, _ in found})


@pytest.mark.parametrize("target", ["act", "emotion"])
def test_shipped_heads_are_of_this_corpus_and_used(corpus, target):
    head = AttributeHead.from_pretrained(sample_dir() / "heads" / target)
    assert head.report["data"]["sha256"] == corpus.sha256
    tiny = tiny_chat_model()
    same = ChatModel(tiny.model, tiny.tokenizer, "smollm2-135m", head.model_sha)
    assert default_head(same, target).sha256 == head.sha256


def test_every_new_dialogue_has_its_situation(corpus):
    lines = (sample_dir() / "situations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [dialogue.id for dialogue in corpus.dialogues[FIRST:]]
    assert len({row["situation"] for row in rows}) == len(rows)
    assert set(Counter(row["variety"] for row in rows)) == {"US", "GB", "L2"}


def test_the_records_are_of_this_corpus_and_the_card_tells_their_numbers(corpus):
    results = results_dir() / "attribute"
    record, guideline = (
        RunRecord.load(results / f"{name}.json") for name in ("sample-corpus", "dailydialog-by-guideline")
    )
    assert record.inputs["data"]["sha256"] == corpus.sha256
    card = " ".join((sample_dir() / "README.md").read_text(encoding="utf-8").split())
    told = [guideline.scores[f"second {what}"]["kappa"] for what in ("act", "emotion")]
    told += [record.scores[f"second {what}"]["kappa"] for what in ("act", "emotion")]
    parts = ("first edition", "second edition", "dailydialog")
    shares = ("with_emotion", "happy_end", "negative_then_happy_end")
    told += [record.scores[part][score] for part in parts for score in ("perplexity", *shares)]
    assert [str(value) for value in told if str(value) not in card] == []
    for own, n in ((record, 400), (guideline, 200)):
        for what in ("act", "emotion"):
            assert f"{round(own.scores[f'second {what}']['agreement'].value * n)} of {n}" in card
    assert f"{record.details['closest'][0][2]:.2f}" in card
    assert f"{record.details['mended']} of them" in card
