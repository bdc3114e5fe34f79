"""Tables, figures and text of a report: from any target and any method, and never kinder to what broke."""

import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.pyplot import close, subplots

from llama_dialogue.compare.figures import plot_control, plot_cost, plot_heat
from llama_dialogue.compare.markdown import replies_side_by_side, write_report
from llama_dialogue.compare.report import (
    best_by_method,
    best_within,
    class_table,
    compare_cells,
    compare_pair,
    method_labels,
    pareto_front,
)
from llama_dialogue.compare.scored import ScoredGrid, read_scores
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.plugins import list_plugins
from llama_dialogue.core.records import RunRecord, load_rows, results_dir, save_rows
from llama_dialogue.core.reference_metrics import reference_counts, summed_reference_scores
from llama_dialogue.core.statistics import Interval, rate_interval
from llama_dialogue.core.targets import ACT, EMOTION, Target

REPLY, REFERENCE = ["I am glad to hear it.", "Why is that so?", "No."], "I am so glad to hear that."
DECODING = {"max_new_tokens": 8, "sample": True, "top_k": 10}
SHOUT = {"method": "shout", "system": "speaker", "decoding": DECODING, "shout": {"volume": 3}}
BEST = {"method": "best_of_n", "decoding": DECODING, "best_of_n": {"of": "vector", "n": 2}}
CELLS = {
    "unsteered": {"method": "none", "system": "speaker", "decoding": DECODING},
    "steering vector, layer 2": {"method": "vector", "decoding": DECODING, "vector": {"layer": 2}},
    "best of 2, steering vector, layer 2": BEST | {"vector": {"layer": 2}},
} | {
    f"PPLM, layers {layers}, step size {size}": {
        "method": "pplm",
        "decoding": DECODING,
        "pplm": {"layers": layers, "step_size": size, "num_iterations": 2},
    }
    for layers in ("upper", [1, 3])
    for size in (0.5, 0.1)
}
SHOUTED = "shouting, volume 3"
RATES = dict(zip(CELLS, (0.2, 0.5, 0.7, 0.3, 0.4, 0.5, 0.6), strict=True)) | {SHOUTED: 0.6, "human": 0.8}


def make_rows(target: Target, cells, dialogues=12) -> pd.DataFrame:
    """Make up scores: some cells hit their class more often, at a higher price."""
    rng, rows, wrong = np.random.default_rng(0), [], len(target.classes)
    for place, cell in enumerate([*cells, "human", "human, first 8 tokens"]):
        human = cell.startswith("human")
        for i in range(dialogues):
            asked = [i % wrong] if human else range(wrong)
            for c in asked:
                hit = rng.random() < RATES[cell.split(",")[0] if human else cell]
                judged = target.classes[c if hit else (c + rng.integers(1, wrong)) % wrong]
                reply, tokens = "" if human else REPLY[(i + c) % 3], int(rng.integers(3, 9))
                nll = tokens * rng.normal(1.5 + place / 10, 0.2)
                row = {"cell": cell, "dialogue_id": f"d{i:02}", "target_class": target.classes[c], "seed": 0}
                row |= {"reply": reply, "stopped": True, "failed": False, "seconds": 0.1 * tokens}
                row |= {"forward_equivalents": (1 + place) * tokens, "judged": judged, "probability": 0.5}
                row |= {"question_mark": "?" in reply, "num_tokens": tokens, "nll": nll, "repetition": 0.0}
                row |= {"other_nll": nll + tokens * rng.normal(0.3, 0.1), "similarity": 0.4}
                row |= {"similarity_floor": 0.2, "ai_talk": False, "meteor_stem": 0.1, "rouge_l": 0.1}
                rows.append(row)
    rows = pd.DataFrame(rows)
    human = rows.cell.str.startswith("human")
    counts = reference_counts(rows.reply.tolist(), [REFERENCE] * len(rows))
    counts[human] = np.nan
    rows.loc[human, ["meteor_stem", "rouge_l", "seconds", "forward_equivalents"]] = np.nan, np.nan, 0, 0
    return rows.assign(overlap=list(counts))


def make_grid(target=ACT, cells=CELLS) -> ScoredGrid:
    return ScoredGrid(make_rows(target, cells), cells, target)


def write_grid(grid, folder, config=None):
    save_rows(grid.rows, folder / "scores.parquet")
    (folder / "cells.json").write_text(json.dumps(grid.cells))
    about = {"config": {"target": grid.target.name} if config is None else config}
    (folder / "grid.json").write_text(json.dumps({"about": about, "parts": []}))
    return folder


@pytest.fixture(scope="module")
def grid():
    return make_grid()


@pytest.fixture(scope="module")
def table(grid):
    return compare_cells(grid)


def break_replies(grid, cell, count):
    """Make replies as they are when they break before their first token, and the judge happens to be right."""
    rows = grid.rows.copy()
    lost = rows.index[rows.cell == cell][:count]
    rows.loc[lost, ["nll", "other_nll"]] = float("nan")
    rows.loc[lost, "num_tokens"] = 0
    rows.loc[lost, "judged"] = rows.loc[lost, "target_class"]
    return replace(grid, rows=rows), lost


# --- what is read -----------------------------------------------------------------------------------------------


def test_a_folder_and_a_record_give_the_same_tables(tmp_path):
    file = results_dir() / "perturb" / "screen-dailydialog.json"
    record, rows = RunRecord.load(file), load_rows(file.with_suffix(".parquet"))
    few = [cell for cell in record.details["cells"] if not cell.startswith(("PPLM", "best", "steering"))]
    record.details["cells"] = {cell: record.details["cells"][cell] for cell in few}
    rows = rows[rows.cell.isin([*few, "human"])].reset_index(drop=True)
    grid = ScoredGrid.from_record(record, rows)
    read = read_scores(write_grid(grid, tmp_path, record.config))
    assert read.target == grid.target == ACT
    pd.testing.assert_frame_equal(compare_cells(read), compare_cells(grid))


def test_what_cannot_be_read(grid, tmp_path):
    folder = write_grid(grid, tmp_path)
    save_rows(grid.rows.drop(columns="other_nll"), folder / "scores.parquet")
    with pytest.raises(InputError, match="no column 'other_nll'"):
        read_scores(folder)
    save_rows(grid.rows.replace({"cell": {"unsteered": "other"}}), folder / "scores.parquet")
    with pytest.raises(InputError, match="'other' is not described"):
        read_scores(folder)
    with pytest.raises(InputError, match="names no target"):
        read_scores(write_grid(grid, tmp_path, {"name": "old"}))
    with pytest.raises(InputError, match="act='sadness'"):
        replace(grid, rows=grid.rows.assign(target_class="sadness"))
    with pytest.raises(InputError, match="no cell of method 'none'"):
        compare_cells(replace(grid, rows=grid.rows[grid.rows.cell != "unsteered"]))
    (folder / "cells.json").unlink()
    with pytest.raises(InputError, match="need the cells beside the scores"):
        read_scores(folder)


# --- tables -----------------------------------------------------------------------------------------------------


def test_every_score_of_a_cell(grid, table):
    for name in (
        *("method", "accuracy", "probability", "precision", "recall", "macro_f1", "share_question"),
        *("perplexity", "median_perplexity", "own_context_wins", "context_gain", "similarity_gain"),
        *("meteor_stem", "rouge_l", "bleu_1", "bleu_2", "nist_2", "nist_4", "distinct_1", "distinct_3"),
        *("entropy_2", "entropy_4", "repetition", "ai_talk", "tokens", "seconds_per_token"),
        *("forward_equivalents_per_token", "seconds_per_reply", "failed", "perplexity_ratio"),
    ):
        assert pd.notna(table[name]["unsteered"]), name
    assert list(table.index) == [*CELLS, "human", "human, first 8 tokens"]
    assert table.verdict.notna().sum() == len(CELLS) - 1
    human = table.loc["human"]
    assert human[["distinct_1", "bleu_1", "seconds_per_token", "gain"]].isna().all()
    assert human[["accuracy", "context_gain", "tokens", "repetition"]].notna().all()
    rows = grid.rows[grid.rows.cell == "unsteered"]
    slow = summed_reference_scores(np.stack(rows.overlap), list(rows.dialogue_id))
    assert all(abs(table.loc["unsteered", name] - score.value) < 1e-9 for name, score in slow.items())


def test_options_are_columns(table):
    wrapped = table.loc["best of 2, steering vector, layer 2"]
    assert (wrapped["method"], wrapped["of"], wrapped["vector.layer"]) == ("best_of_n", "vector", 2)
    assert wrapped["best_of_n.n"] == 2 and isinstance(wrapped["best_of_n.n"], int)
    assert table["pplm.layers"]["PPLM, layers [1, 3], step size 0.1"] == [1, 3]
    assert table.loc["unsteered", ["of", "pplm.layers"]].isna().all()


def test_perplexity_ratio_is_paired_over_dialogues(grid, table):
    cell = "steering vector, layer 2"
    sums = grid.rows.groupby(["cell", "dialogue_id"])[["nll", "num_tokens"]].sum()
    own, base = (sums.loc[name].to_numpy() for name in (cell, "unsteered"))

    def ratio(drawn):
        (a, b), (c, d) = own[drawn].sum(axis=0), base[drawn].sum(axis=0)
        return np.exp(a / b) / np.exp(c / d)

    draws = [ratio(drawn) for drawn in np.random.default_rng(0).integers(12, size=(2000, 12))]
    found = table.perplexity_ratio[cell]
    assert np.allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]))
    assert np.isclose(found.value, ratio(np.arange(12)))
    assert np.isclose(found.value, table.perplexity[cell].value / table.perplexity["unsteered"].value)
    assert table.perplexity_ratio["unsteered"] == Interval(1.0, 1.0, 1.0, 48)


def test_any_two_cells(grid, table):
    cell = "steering vector, layer 2"
    pair = compare_pair(grid, cell, "unsteered")
    assert pair["accuracy_difference"] == table.gain[cell]
    assert pair["perplexity_ratio"] == table.perplexity_ratio[cell]
    gain = table.context_gain
    difference = gain[cell].value - gain["unsteered"].value
    assert np.isclose(pair["context_gain_difference"].value, difference)
    same = compare_pair(grid, cell, cell)
    assert (same["p"], same["accuracy_difference"].value, same["perplexity_ratio"].value) == (1.0, 0.0, 1.0)
    with pytest.raises(InputError, match="need the same dialogues"):
        compare_pair(grid, "human", cell)
    with pytest.raises(InputError, match="e.g. 'unsteered'"):
        compare_pair(grid, cell, "unstered")


def test_replies_that_broke_count_as_misses(grid, table):
    cell = "PPLM, layers upper, step size 0.5"
    broken, lost = break_replies(grid, cell, 8)
    row, rest = compare_cells(broken).loc[cell], grid.rows.drop(lost)
    rest = rest[rest.cell == cell]
    hits = (rest.judged == rest.target_class).sum()
    assert (
        (table.failed[cell], row.failed) == (0, 8)
        and row.accuracy.value == hits / 48
        and row.accuracy.n == 48
    )
    assert np.isclose(row.perplexity.value, np.exp(rest.nll.sum() / rest.num_tokens.sum()))
    assert abs(sum(row[f"share_{name}"] for name in ACT.classes) - 40 / 48) < 1e-9
    own = class_table(broken)
    own = own[own.cell == cell]
    assert own.n.sum() == 48 and abs(own.share.sum() - 40 / 48) < 1e-9


def test_classes(grid, table):
    classes = class_table(grid)
    assert len(classes) == len(table) * 4
    one = classes[(classes.cell == "unsteered") & (classes.target_class == "directive")].iloc[0]
    rows = grid.rows[grid.rows.cell == "unsteered"]
    asked, called = rows[rows.target_class == "directive"], rows[rows.judged == "directive"]
    assert one.n == 12 and one.share == len(called) / len(rows)
    assert one.recall == rate_interval(asked.judged == "directive", list(asked.dialogue_id))
    assert one.precision == (called.target_class == "directive").mean()
    assert one.question_mark == asked.question_mark.mean()
    rows = grid.rows[grid.rows.target_class != "directive"]
    none = class_table(replace(grid, rows=rows)).query("target_class == 'directive'")
    assert (none.n == 0).all() and all(np.isnan(v.value) for v in none.recall)


# --- methods and budgets ----------------------------------------------------------------------------------------


def made_up(rows):
    """Make a table of (cell, method, accuracy, ratio, layers)."""
    found = {
        cell: {
            "method": method,
            "of": None,
            "pplm.layers": layers,
            "accuracy": Interval(accuracy, 0.0, 1.0, 8),
            "perplexity_ratio": Interval(ratio, 0.0, 9.0, 8),
            "verdict": None if method in ("none", "human") else "better",
        }
        for cell, method, accuracy, ratio, layers in rows
    }
    return pd.DataFrame(found).T.rename_axis("cell")


def test_best_of_each_method_within_a_budget():
    table = made_up(
        [
            ("plain", "none", 0.9, 1.0, None),
            ("a", "pplm", 0.4, 1.2, "upper"),
            ("b", "pplm", 0.8, 1.4, "upper"),
            ("c", "pplm", 0.5, 1.1, [2, 4]),
            ("d", "vector", 0.6, 1.25, None),
            ("e", "guided", 0.7, 1.6, None),
            ("human", "human", 1.0, 1.0, None),
        ]
    )
    assert best_by_method(table, 1.25).cell.to_dict() == {"steering vector": "d", "PPLM": "c"}
    assert best_by_method(table, 1.5).cell.to_dict() == {"PPLM": "b", "steering vector": "d"}
    split = best_by_method(table, 1.25, by_layers=True)
    assert split.cell.to_dict() == {
        "steering vector": "d",
        "PPLM, layers 2-4": "c",
        "PPLM, layers upper": "a",
    }
    assert best_within(table, 1.25) == "d" and best_within(table, 1.05) is None
    assert pareto_front(table) == ["plain"]


@pytest.mark.parametrize("order", [1, -1])
def test_ties_are_broken_by_a_rule_and_not_by_order(order):
    rows = [("y", "pplm", 0.5, 1.2, "all"), ("z", "pplm", 0.5, 1.1, "all"), ("x", "pplm", 0.5, 1.1, "all")]
    table = made_up([("plain", "none", 0.2, 1.0, None), *rows[::order]])
    assert best_within(table, 1.5) == "x" and pareto_front(table) == ["plain", "x"]


def test_a_second_cell_without_steering_is_a_cell_like_others(monkeypatch):
    cells = {
        "unsteered": CELLS["unsteered"],
        "unsteered, system friend": CELLS["unsteered"] | {"system": "friend"},
    }
    monkeypatch.setitem(RATES, "unsteered, system friend", 0.9)
    table = compare_cells(make_grid(cells=cells))
    assert best_within(table, 9) == "unsteered, system friend" and table.verdict.isna()["unsteered"]


# --- another target, another package's method -------------------------------------------------------------------

PLUGIN = """
from llama_dialogue.compare.methods import Method
from llama_dialogue.core.config import Config, frozen

@frozen
class ShoutOptions(Config):
    volume: int = 2

SHOUT = Method("shout", "shouting", ShoutOptions, lambda request: None, costly=("volume",))
"""


@pytest.fixture
def shout(tmp_path, monkeypatch):
    """Install a package that brings a method."""
    (tmp_path / "shouting.py").write_text(PLUGIN)
    (tmp_path / "shouting-1.0.dist-info").mkdir()
    (tmp_path / "shouting-1.0.dist-info" / "METADATA").write_text("Name: shouting\nVersion: 1.0\n")
    entry = "[llama_dialogue.methods]\nshout = shouting:SHOUT\n"
    (tmp_path / "shouting-1.0.dist-info" / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    list_plugins.cache_clear()
    yield
    sys.modules.pop("shouting", None)
    list_plugins.cache_clear()


def legend(table):
    _, ax = subplots()
    told = [text.get_text() for text in plot_control(ax, table).get_legend().texts]
    colors = [tuple(part.get_facecolor()[0]) for part in ax.collections if part.get_label() in told]
    close("all")
    return dict(zip(told, colors, strict=False))


def test_a_method_from_another_package(shout):
    table = compare_cells(make_grid(cells=CELLS | {SHOUTED: SHOUT}))
    assert table["shout.volume"][SHOUTED] == 3 and table["of"].isna()[SHOUTED]
    assert method_labels(table)[SHOUTED] == "shouting" and method_labels(table, "cost")[SHOUTED] == SHOUTED
    colors = legend(table)
    assert len({color for label, color in colors.items() if "best of n" not in label}) == len(colors) - 1
    assert "shouting" in colors and best_by_method(table, 9).cell["shouting"] == SHOUTED


def test_a_method_that_is_not_installed_keeps_its_name():
    table = compare_cells(make_grid(cells=CELLS | {SHOUTED: SHOUT}))
    assert method_labels(table, "cost")[SHOUTED] == "shout" and "shout" in legend(table)


def test_colours_do_not_depend_on_the_other_cells(grid, table):
    few = {cell: CELLS[cell] for cell in ("unsteered", "steering vector, layer 2")}
    rows = grid.rows[grid.rows.cell.isin(few)]
    alone = legend(compare_cells(ScoredGrid(rows, few, ACT)))
    assert all(legend(table)[label] == color for label, color in alone.items())
    assert legend(table)["best of n, steering vector"] == alone["steering vector"]


def test_a_report_on_emotions(tmp_path, shout):
    grid = make_grid(EMOTION, CELLS | {SHOUTED: SHOUT})
    path, table = write_report(write_grid(grid, tmp_path))
    text = path.read_text()
    assert {f"share_{name}" for name in EMOTION.classes} <= set(table) and "share_question" not in table
    assert "steered to emotion: no_emotion, anger" in text and SHOUTED in text
    assert len(pd.read_csv(tmp_path / "report_classes.csv")) == 7 * len(table)


# --- text and files ---------------------------------------------------------------------------------------------


def test_files(grid, table, tmp_path):
    folder = write_grid(grid, tmp_path)
    path, _ = write_report(folder, tmp_path / "out", Interval(0.74, 0.719, 0.76, 2076))
    figures = ("control", "cost", "heat-pplm")
    names = {"report.md", "report.csv", "report_classes.csv", *(f"report__{name}.png" for name in figures)}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    written, classes = (pd.read_csv(tmp_path / "out" / name) for name in ("report.csv", "report_classes.csv"))
    assert np.allclose(written.perplexity_ratio_low, [v.low for v in table.perplexity_ratio])
    assert {"recall", "recall_low", "recall_high"} <= set(classes) and written[
        "pplm.num_iterations"
    ].max() == 2
    text = path.read_text()
    assert "0.740 [0.719, 0.760] (n = 2,076)" in text and "10 likeliest tokens" in text
    for told in (
        "meteor_stem",
        "forward equivalents per token",
        "human, first 8 tokens",
        "## Target accuracy by",
    ):
        assert told in text, told
    for word in ("as wanted", "METEOR |", "judge says", "passes a token"):
        assert word not in text, word


def test_a_cell_that_broke_altogether_is_reported_and_never_best(grid, tmp_path):
    cell = "best of 2, steering vector, layer 2"
    broken, _ = break_replies(grid, cell, 48)
    path, table = write_report(write_grid(broken, tmp_path))
    assert table.accuracy[cell].value == 0 and table.failed[cell] == 48
    assert np.isnan(table.perplexity_ratio[cell].value) and cell not in pareto_front(table)
    assert cell not in best_by_method(table, np.inf).cell.tolist() and cell in path.read_text()


def test_replies_cannot_tear_the_report(grid, tmp_path):
    rows = grid.rows.copy()
    rows.loc[rows.cell == "unsteered", "reply"] = "one | two\nthree"
    torn = replace(grid, rows=rows)
    text = write_report(write_grid(torn, tmp_path))[0].read_text()
    lines = text[text.index("## Replies") :].splitlines()[2:]
    assert r"one \| two three" in lines[-1] and all(line.startswith("|") for line in lines)
    assert replies_side_by_side(torn, ["unsteered"], n=3).shape == (12, 1)


def test_a_grid_of_one_cell(tmp_path):
    cells = {"unsteered": CELLS["unsteered"]}
    path, table = write_report(write_grid(make_grid(cells=cells), tmp_path))
    assert table.gain.isna().all() and "There is no steered cell." in path.read_text()


def test_figures_of_what_is_not_there(table):
    _, ax = subplots()
    with pytest.raises(InputError, match="no cell of method 'vector' with strength and layer"):
        plot_heat(ax, table, "vector", "strength", "layer")
    plot_heat(ax, table, "pplm", "step_size", "layers")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0.1", "0.5"]
    _, ax = subplots()
    plot_cost(ax, table)
    assert "PPLM, layers 1-3, 2 iterations" in [tick.get_text() for tick in ax.get_yticklabels()]
    close("all")
