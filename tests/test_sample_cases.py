"""The sample cases and messages are balanced and varied: what the data card promises is counted here."""

import csv
import re
from collections import Counter, defaultdict
from statistics import mean

import pytest

from llama_dialogue.core.paths import sample_dir


def read(name):
    with open(sample_dir() / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def cases():
    return read("cases.csv")


def test_fields_and_outcomes_are_balanced(cases):
    counts = Counter((case["field"], case["first_party_winner"]) for case in cases)
    assert len(cases) == 140 and len(counts) == 20 and set(counts.values()) == {7}
    assert len({case["ID"] for case in cases}) == len({case["facts"] for case in cases}) == 140


def test_lengths_do_not_tell_the_outcome(cases):
    words = {case["ID"]: len(case["facts"].split()) for case in cases}
    assert 60 <= min(words.values()) and max(words.values()) <= 200
    won, lost = (mean(words[c["ID"]] for c in cases if c["first_party_winner"] == side) for side in "10")
    assert abs(won - lost) <= 0.05 * min(won, lost)


def test_no_wording_returns(cases):
    seen = defaultdict(set)
    for case in cases:
        words = re.findall(r"\w+", case["facts"].lower())
        for start in range(len(words) - 5):
            seen[tuple(words[start : start + 6])].add(case["ID"])
    assert not [" ".join(gram) for gram, ids in seen.items() if len(ids) > 1]
    private = [case["first_party"] for case in cases if not case["first_party"].startswith("State of")]
    assert max(Counter(private).values()) == 1


def test_parties_are_named_in_full_in_part_or_not_at_all(cases):
    full = [
        case
        for case in cases
        if case["first_party"] in case["facts"] and case["second_party"] in case["facts"]
    ]
    none = [
        c
        for c in cases
        if not (set(re.findall(r"\w{4,}", c["first_party"])) & set(re.findall(r"\w+", c["facts"])))
    ]
    assert 0.45 <= len(full) / len(cases) <= 0.7 and len(none) >= 0.1 * len(cases)


def test_messages_are_half_complaints_and_openings_are_short():
    messages = read("messages.csv")
    assert Counter(m["label"] for m in messages) == {"complaint": 30, "no complaint": 30}
    assert len({m["text"] for m in messages}) == 60
    openings = (sample_dir() / "openings.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(openings)) == 40 and all(2 <= len(opening.split()) <= 5 for opening in openings)
