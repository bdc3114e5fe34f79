"""A sheet tells nothing, its labels find their replies again, and the comparison is what a hand would compute."""

import pandas as pd
import pytest

from llama_dialogue.compare.annotation import (
    join_labels,
    label_agreement,
    read_annotation,
    sample_for_annotation,
    save_annotation,
)
from llama_dialogue.core.dialogues import Turn
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.targets import ACTS

CELLS = ["none", "pplm layers=upper", "guided"]
CONTEXTS = {f"d{i}": (Turn(f"Shall we meet on day {i}?"),) for i in range(5)}


@pytest.fixture
def scores():
    rows = [
        (cell, dialogue, act, 0, f"reply {cell} {dialogue} {act}", judged)
        for cell in CELLS
        for dialogue in CONTEXTS
        for act, judged in zip(ACTS, ("inform", "question", "inform", "inform"), strict=True)
    ]
    return pd.DataFrame(rows, columns=["cell", "dialogue_id", "act", "seed", "reply", "judged"])


def test_a_sheet_holds_as_many_of_each_cell_and_hides_them(scores):
    sheet = sample_for_annotation(scores, CONTEXTS, n=12)
    assert list(sheet) == ["row", "context", "reply", "label"] and sheet.row.is_unique
    cells = sheet.reply.map(scores.set_index("reply").cell)
    assert cells.value_counts().to_dict() == dict.fromkeys(CELLS, 4)
    assert not cells.is_monotonic_increasing and set(sheet.label) == {""}
    assert all(sheet.row.str.fullmatch("[0-9a-f]{12}"))
    pd.testing.assert_frame_equal(sheet, sample_for_annotation(scores, CONTEXTS, n=12))
    assert set(sheet.row) != set(sample_for_annotation(scores, CONTEXTS, n=12, seed=1).row)


def test_labels_find_their_replies_in_any_order(scores, tmp_path):
    sheet = sample_for_annotation(scores, CONTEXTS, n=30)
    wanted = scores.set_index("reply").act
    filled = sheet.assign(label=sheet.reply.map(wanted)).sample(frac=1, random_state=3)
    labelled = join_labels(
        scores.sample(frac=1, random_state=1), read_annotation(save_annotation(filled, tmp_path / "s.csv"))
    )
    assert len(labelled) == 30 and (labelled.label == labelled.act).all()
    found = label_agreement(labelled)
    assert found["wanted_by_person"].value == 1
    right = labelled.act.isin(["inform", "question"]).mean()
    assert found["wanted_by_judge"].value == found["agreement"].value == pytest.approx(right)
    with pytest.raises(InputError, match="perhaps with labels"):
        save_annotation(filled, tmp_path / "s.csv")


def test_kappa_is_cohens(scores):
    labelled = scores.assign(label=["question"] * 30 + ["inform"] * 30)
    same = (labelled.label == labelled.judged).mean()
    chance = sum((labelled.label == act).mean() * (labelled.judged == act).mean() for act in ACTS)
    assert label_agreement(labelled)["kappa"].value == pytest.approx((same - chance) / (1 - chance))


@pytest.mark.parametrize(
    "text, told",
    [
        ("row,label\nabc,statement\n", ":2: label 'statement'"),
        ("row,label\nabc,inform\ndef,\n", ":3: label ''"),
        ("row,act\nabc,inform\n", "no column 'label'"),
        ("", "not a sheet"),
    ],
)
def test_a_wrong_sheet_is_refused(tmp_path, text, told):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=told):
        read_annotation(tmp_path / "s.csv")


def test_labels_of_another_grid_are_refused(scores):
    labels = pd.DataFrame({"row": ["0" * 12], "label": ["inform"]})
    with pytest.raises(InputError, match="1 of 1 labels belong to no reply"):
        join_labels(scores, labels)


@pytest.mark.parametrize("n", [0, 61])
def test_a_sheet_of_no_or_too_many_replies_is_refused(scores, n):
    with pytest.raises(InputError, match="need 1..60"):
        sample_for_annotation(scores, CONTEXTS, n)
