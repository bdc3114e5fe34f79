"""Cells, grids, scores and annotations: the same rows from any order, worker or restart, and no fault that costs one."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import lru_cache

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_head, make_judge
from tqdm import tqdm

from llama_dialogue.attribute.features import encode_replies
from llama_dialogue.attribute.judge import Judge
from llama_dialogue.compare import scores as scores_module
from llama_dialogue.compare.annotation import (
    annotation_agreement,
    join_annotation,
    read_annotation,
    sample_for_annotation,
    save_annotation,
)
from llama_dialogue.compare.cells import GridConfig, expand_cells
from llama_dialogue.compare.grid import differing_share, plan_grid, run_grid
from llama_dialogue.compare.methods import SteeringInputs
from llama_dialogue.compare.scores import is_human, score_grid
from llama_dialogue.core import grid
from llama_dialogue.core.contexts import draw_contexts
from llama_dialogue.core.dialogues import Turn, load_corpus, write_jsonl
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.grid import read_parts
from llama_dialogue.core.metrics import reply_nll
from llama_dialogue.core.models import load_encoder, tiny_chat_model
from llama_dialogue.core.paths import checkout_dir
from llama_dialogue.core.records import RunRecord, load_rows, results_dir
from llama_dialogue.core.targets import ACT, ACTS
from llama_dialogue.perturb.layers import select_layers
from llama_dialogue.prompting.prompts import build_prompt

FORK = multiprocessing.get_context("fork")
CELLS = (
    {"method": ["none", "prompt"]},
    {"method": "pplm", "pplm": {"layers": ["lower", "upper"], "step_size": 0.5, "num_iterations": [1, 2]}},
    {"method": "best_of_n", "best_of_n": {"n": 2}},
)
LABELS = [
    "unsteered",
    "instruction in the prompt",
    *(f"PPLM, layers {part}, step size 0.5, {n} iterations" for part in ("lower", "upper") for n in (1, 2)),
    "best of 2",
]
N = 3  # contexts, in shards of two


def make_config(**values):
    return GridConfig.from_dict(
        {
            "name": "tiny",
            "cells": list(CELLS),
            "decoding": {"max_new_tokens": 4},
            "model": "tiny-llama-random",
            "dtype": "fp64",
            "system": "none",  # short prompts
            "contexts": {"n": N, "max_context": 3},
            "shard_size": 2,
            "towards": "reference",
        }
        | values
    )


@pytest.fixture(scope="module")
def inputs():
    return SteeringInputs(head=make_head())


@pytest.fixture(scope="module")
def exact(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact")
    run_grid(make_config(), out, progress=False, inputs=inputs)
    return out


def same(first, second, ignore=("seconds",)):
    """Compare rows, whatever their order."""
    names = ["cell", "dialogue_id", "target_class", "seed"]
    first, second = (
        rows.drop(columns=list(ignore)).sort_values(names).reset_index(drop=True) for rows in (first, second)
    )
    pd.testing.assert_frame_equal(first, second, check_exact=True)


# --- cells ------------------------------------------------------------------------------------------------------


def labels_of(config):
    return [cell.label for cell in expand_cells(config)]


def test_the_original_study_s_grid():
    config = GridConfig.from_yaml(checkout_dir() / "configs" / "perturb" / "original-grid.yaml")
    cells = expand_cells(config)
    steered = [cell.steering.options["pplm"] for cell in cells if cell.method == "pplm"]
    assert len(cells) == len({cell.label for cell in cells}) == 169
    assert len({own["step_size"] for own in steered}) == 14
    assert {own["num_iterations"] for own in steered} == {3, 5, 7}
    for num_layers, ranges in (
        (30, {(0, 30), (0, 10), (10, 20), (20, 30)}),
        (32, {(0, 32), (0, 11), (11, 22), (21, 32)}),
    ):
        found = [select_layers(own["layers"], num_layers) for own in steered]
        assert {(layers.start, layers.stop) for layers in found} == ranges


@pytest.mark.parametrize(
    "name", ["perturb/screen-dailydialog", "perturb/test-dailydialog", "demo/dailydialog"]
)
def test_the_cells_of_a_record_follow_from_its_config(name):
    record = RunRecord.load(results_dir() / f"{name}.json")
    cells = expand_cells(GridConfig.from_dict(record.config))
    assert [cell.label for cell in cells] == list(record.details["cells"])
    for cell, kept in zip(cells, record.details["cells"].values(), strict=True):
        own = cell.to_dict()
        if "pplm" in own:
            own["pplm"]["batch_size"] = own["pplm"]["batch_size"] or own["decoding"]["batch_size"]
        for key, value in kept.items():
            assert own[key] == (own[key] | value if isinstance(value, dict) else value), (cell.label, key)


def test_cells_are_not_repeated():
    cells = [
        {"method": "pplm", "pplm": {"layers": ["upper", "lower"]}},
        {"pplm": {"layers": "upper", "step_size": 0.2}, "method": "pplm"},
        {"method": "none"},
    ]
    assert labels_of(make_config(cells=cells)) == ["PPLM, layers upper", "PPLM, layers lower", "unsteered"]


def test_config_survives_yaml(tmp_path):
    config = make_config(cells=[{"method": "pplm", "pplm": {"layers": [[1, 3], "all"]}}])
    config.to_yaml(tmp_path / "grid.yaml")
    again = GridConfig.from_yaml(tmp_path / "grid.yaml")
    assert again == config and labels_of(again) == ["PPLM, layers 1-3", "PPLM, layers all"]


def test_old_names_are_aliases():
    new = [{"method": "best_of_n", "best_of_n": {"of": "offsets", "n": 3}, "offsets": {"strength": 2.0}}]
    old = [{"method": "distilled_best_of_n", "best_of_n": {"n": 3}, "offsets": {"strength": 2.0}}]
    assert expand_cells(make_config(cells=old)) == expand_cells(make_config(cells=new))
    assert labels_of(make_config(cells=old)) == ["best of 3, offsets, strength 2"]


def test_options_of_one_method_do_not_block_another():
    config = make_config(cells=[{"method": "none"}], pplm={"step_size": "far"}, nudging={"layer": 3})
    assert labels_of(config) == ["unsteered"] and expand_cells(config)[0].steering.options == {}
    with pytest.raises(InputError, match=r"pplm\.step_size='far'"):
        expand_cells(make_config(cells=[{"method": "pplm"}], pplm={"step_size": "far"}))
    with pytest.raises(InputError, match="'plpm'.*'pplm'"):
        make_config(cells=[{"method": "none"}], plpm={"step_size": 0.3})


@pytest.mark.parametrize(
    "values, told",
    [
        ({"cells": []}, "at least one group"),
        ({"cells": [{"pplm": {"layers": "upper"}}]}, "has no method"),
        ({"cells": [{"method": "pplmm"}]}, "'pplm'"),
        ({"cells": [{"method": "none"}, {"method": "pplm", "pplm": {"layers": "uper"}}]}, "cells[1]: pplm."),
        ({"cells": [{"method": "pplm", "pplm": {"layers": "uper"}}]}, "'upper'"),
        (
            {"cells": [{"method": "pplm", "pplm": {"layers": [1, 3]}}]},
            "pplm.layers=1: need text or a list of 2",
        ),
        ({"cells": [{"method": "pplm", "pplm": {"step_size": [0.1, -1]}}]}, "step_size=-1"),
        ({"cells": [{"method": "pplm", "pplm": {"stepsize": 0.1}}]}, "'pplm.step_size'"),
        ({"cells": [{"method": "pplm", "vector": {"layer": 1}}]}, "unknown key 'vector'"),
        ({"cells": [{"method": "pplm", "step_size": 0.1}]}, "unknown key 'step_size'"),
        ({"cells": [{"method": "best_of_n", "best_of_n": {"of": "pplmm"}}]}, "'pplm'"),
        ({"decoding": {"top_kk": 3}}, "'decoding.top_k'"),
        ({"towards": "both"}, "'reference'"),
        ({"target": "akt"}, "'act'"),
        ({"contexts": {"n": 0}}, "n=0: need at least 1"),
        ({"seeds": [1, 1]}, "each once"),
        ({"shard_size": 0}, "at least 1"),
    ],
)
def test_bad_config(values, told):
    with pytest.raises(InputError) as caught:
        expand_cells(make_config(**values))
    assert told in str(caught.value) and "\n" not in str(caught.value)


# --- the grid ---------------------------------------------------------------------------------------------------


def test_columns_and_rows(exact):
    rows = read_parts(exact)
    assert list(rows) == [
        *("cell", "dialogue_id", "target_class", "seed", "reply", "token_ids", "stopped", "failed"),
        *("seconds", "forward_equivalents"),
    ]
    assert (rows.forward_equivalents > rows.token_ids.map(len)).all()  # the prompt counts too
    assert len(rows) == 7 * N and rows.token_ids.map(lambda ids: str(ids.dtype)).eq("int32").all()
    cells = json.loads((exact / "cells.json").read_text())
    assert list(cells) == list(dict.fromkeys(rows.cell)) == LABELS
    assert cells["PPLM, layers upper, step size 0.5, 2 iterations"]["pplm"]["num_iterations"] == 2
    plain = rows[rows.cell == "unsteered"].set_index("dialogue_id").token_ids
    moved = rows[rows.cell.str.startswith("PPLM")]
    assert any(list(ids) != list(plain[d]) for d, ids in zip(moved.dialogue_id, moved.token_ids, strict=True))


def test_order_of_cells_does_not_matter(exact, inputs, tmp_path):
    run_grid(make_config(cells=list(CELLS[::-1])), tmp_path, progress=False, inputs=inputs)
    same(read_parts(exact), read_parts(tmp_path))


@pytest.fixture
def hears_ctrl_c():
    """A process that a script started in the background is deaf to Ctrl-C, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_alone(config, out, inputs):
    """Run a grid in a process of its own, on one thread: those of the parent are not there."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the parent's is shared with it, and would stay locked if it is killed
    run_grid(config, out, progress=False, inputs=inputs)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_kill_a_real_run(exact, inputs, tmp_path, kill, hears_ctrl_c, capfd):
    out, limit = tmp_path / "out", time.monotonic() + 60
    victim = FORK.Process(target=run_alone, args=(make_config(), out, inputs))
    victim.start()
    while len(list((out / "parts").glob("*.parquet"))) < 2:
        assert victim.is_alive() and time.monotonic() < limit, capfd.readouterr().err
        time.sleep(0.005)
    os.kill(victim.pid, kill)
    victim.join()
    there = len(list((out / "parts").glob("*.parquet")))
    if kill == signal.SIGINT:
        assert f"interrupted: {there} of 14 parts are in {out}" in capfd.readouterr().err
    summary = run_grid(make_config(), out, progress=False, inputs=inputs)
    assert victim.exitcode != 0 and (summary.found, summary.damaged) == (there, ())
    same(read_parts(exact), read_parts(out))


def test_float32_gives_the_same_tokens_whatever_the_shards(inputs, tmp_path):
    options = {"dtype": "fp32", "cells": list(CELLS[:2])}
    for size in (2, N):
        config = make_config(shard_size=size, **options)
        run_grid(config, tmp_path / str(size), progress=False, inputs=inputs)
    assert differing_share(read_parts(tmp_path / "2"), read_parts(tmp_path / str(N))) == 0


def test_all_targets_and_seeds(tmp_path):
    config = make_config(cells=[{"method": "none"}], towards="all", seeds=[0, 1], contexts={"n": 3})
    run_grid(config, tmp_path, progress=False)
    rows = read_parts(tmp_path)
    seeds = rows.groupby(["dialogue_id", "target_class"]).seed.apply(list)
    assert len(rows) == 3 * 4 * 2 and seeds.map([0, 1].__eq__).all()
    assert len({tuple(ids) for ids in rows.token_ids}) == len(rows), (
        "every row has a random stream of its own"
    )


def test_what_the_key_depends_on(inputs):
    chat = tiny_chat_model(dtype=torch.float64)

    def keys(config=None, **parts):
        plan = plan_grid(config or make_config(), **({"chat": chat, "inputs": inputs} | parts))
        return {(item.cell["label"], item.shard): item.key for item in plan.items}

    base = keys()
    other = keys(inputs=SteeringInputs(head=make_head(seed=6)))
    changed = {cell for (cell, shard), key in other.items() if key != base[cell, shard]}
    assert changed == set(LABELS) - {"unsteered", "instruction in the prompt"}
    for other in (
        keys(chat=replace(chat, sha256="0" * 64)),
        keys(chat=tiny_chat_model(dtype=torch.float32)),
        keys(make_config(seeds=[1])),
        keys(make_config(contexts={"n": N, "seed": 1})),
        keys(make_config(towards="all")),
        keys(make_config(decoding={"max_new_tokens": 5})),
    ):
        assert not set(other.values()) & set(base.values())
    assert keys(make_config(name="renamed", judge="runs/judge")) == base


def test_bad_requests_leave_nothing_behind(inputs, tmp_path):
    outside = make_config(cells=[{"method": "pplm", "pplm": {"layers": [[2, 5]]}}])
    for config, given, told in (
        (outside, inputs, "0 <= start < stop <= 4"),
        (make_config(), SteeringInputs(head=make_head(width=32)), "width"),
        (
            make_config(),
            SteeringInputs(head=make_head(classes=list("abcd"))),
            "head for a, b, c, d, used for",
        ),
        (make_config(), SteeringInputs(), r"without head: need e\.g\. SteeringInputs\(head="),
        (make_config(inputs={"head": str(tmp_path / "none")}), None, "inputs.head=.*: no such folder"),
        (make_config(contexts={"n": 10**6}), inputs, "need at most"),
    ):
        with pytest.raises(InputError, match=told):
            run_grid(config, tmp_path / "out", progress=False, inputs=given)
    assert not list((tmp_path / "out").rglob("*"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file stands"):
        run_grid(make_config(), tmp_path / "file" / "out", progress=False, inputs=inputs)
    with pytest.raises(InputError, match="leave chat out"):
        run_grid(make_config(), tmp_path / "out", engine="ray", chat=tiny_chat_model(), inputs=inputs)


def test_runs_of_different_grids_cannot_be_compared(exact):
    rows = read_parts(exact)
    with pytest.raises(InputError, match="the same grid"):
        differing_share(rows, rows[rows.cell == "unsteered"])


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_encoder():
    """Load the encoder of the similarity once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores_module, "load_encoder", lru_cache(load_encoder))
        yield


@pytest.fixture(scope="module")
def judge():
    return make_judge(0)


@pytest.fixture(scope="module")
def scored(exact, judge, tmp_path_factory):
    """A scored grid; a test that changes it takes a copy."""
    out = tmp_path_factory.mktemp("scored") / "grid"
    shutil.copytree(exact, out)
    score_grid(out, judge=judge, progress=False)
    return out


@pytest.fixture
def copied(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "grid")


@pytest.fixture
def unscored(exact, tmp_path):
    return shutil.copytree(exact, tmp_path / "grid")


def examples_of(config):
    return {example.dialogue_id: example for example in draw_contexts(config.contexts, load_corpus())}


def test_scores(scored, judge):
    rows, scores = read_parts(scored), pd.read_parquet(scored / "scores.parquet")
    assert list(scores) == [
        *("cell", "dialogue_id", "target_class", "seed", "reply", "stopped", "failed", "seconds"),
        *("forward_equivalents", "judged", "probability", "question_mark", "num_tokens", "nll", "other_nll"),
        *("similarity", "similarity_floor", "repetition", "ai_talk", "meteor_stem", "rouge_l", "overlap"),
    ]
    human, made = scores[scores.cell == "human"], scores[~is_human(scores.cell)].reset_index(drop=True)
    assert len(human) == N and human.dialogue_id.is_unique and set(human.reply) == {""}
    examples = examples_of(make_config())
    assert [examples[i].reply.act for i in human.dialogue_id] == human.target_class.tolist()
    assert made.reply.equals(rows.reply) and made.num_tokens.tolist() == rows.token_ids.map(len).tolist()
    chat = tiny_chat_model()
    prompts = [build_prompt(chat.tokenizer, examples[i].context, "none") for i in rows.dialogue_id]
    nll, _ = reply_nll(chat.model, chat.tokenizer, prompts, rows.token_ids.tolist())
    assert abs(made.nll - nll).max() < 1e-3
    assert human.meteor_stem.isna().all() and made.drop(columns="overlap").notna().all(axis=None)
    assert made.groupby("dialogue_id").forward_equivalents.min().gt(0).all()
    assert not human.forward_equivalents.any()
    log_probs = judge.predict([examples[i] for i in human.dialogue_id])
    assert human.judged.tolist() == [ACTS[i] for i in log_probs.argmax(-1).tolist()]


def test_human_replies_are_also_scored_as_short_as_made_ones(scored):
    scores = pd.read_parquet(scored / "scores.parquet")
    human, cut = (scores[scores.cell == name] for name in ("human", "human, first 4 tokens"))
    assert cut.dialogue_id.tolist() == human.dialogue_id.tolist() and set(cut.reply) == {""}
    assert cut.num_tokens.tolist() == human.num_tokens.clip(upper=4).tolist() and human.num_tokens.max() > 4
    assert (cut.nll.to_numpy() <= human.nll.to_numpy() + 1e-9).all(), "a beginning of the same tokens"
    assert set(scores.cell) == {*LABELS, "human", "human, first 4 tokens"}


def test_no_corpus_text_is_written(scored):
    texts = {example.reply.text for example in examples_of(make_config()).values()}
    for path in scored.rglob("*.parquet"):
        assert not texts & set(pd.read_parquet(path).get("reply", []))


def test_scores_are_kept_until_the_judge_changes(copied, judge, monkeypatch, tmp_path):
    first = pd.read_parquet(copied / "scores.parquet")
    monkeypatch.setattr(Judge, "predict", lambda *_: pytest.fail("scored twice"))
    pd.testing.assert_frame_equal(score_grid(copied, judge=judge, progress=False), first)
    monkeypatch.undo()
    other = make_judge(1).save_pretrained(tmp_path / "judge")
    second = score_grid(copied, judge=other, progress=False)
    assert (second.probability != first.probability).any() and second.nll.equals(first.nll)


def test_scores_of_an_unfinished_grid(unscored, judge):
    for path in (unscored / "parts").glob("[0-7]*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match="parts are missing"):
        score_grid(unscored, judge=judge, progress=False)
    some = score_grid(unscored, judge=judge, progress=False, partial=True)
    assert 2 * N < len(some) < 7 * N + 2 * N


def test_a_second_model_and_a_record(copied, judge, tmp_path):
    plain = pd.read_parquet(copied / "scores.parquet")
    second = tiny_chat_model("gemma")
    scores = score_grid(copied, judge=judge, progress=False, second=second, records=tmp_path)
    assert "second_nll" not in plain and scores.second_nll.gt(0).all() and scores.second_words.ge(1).all()
    pd.testing.assert_frame_equal(scores[list(plain)], plain)
    record = RunRecord.load(tmp_path / "perturb" / f"{make_config().name}.json")
    rows, about = load_rows(tmp_path / "perturb" / record.rows), grid.load_manifest(copied)["about"]
    assert record.job == "grid" and record.config == about["config"] == make_config().to_dict()
    readers = {"judge": judge.sha256, "second_model": second.sha256}
    shas = {role: thing["sha256"] for role, thing in record.inputs.items()}
    assert shas == {role: thing["sha256"] for role, thing in about["inputs"].items()} | readers
    assert set(shas) == {"model", "data", "head", "judge", "second_model"}
    assert record.scores["human"]["accuracy"].n == N and set(record.scores) == set(rows.cell)
    assert record.details["grid"]["rows"] == len(scores) - 2 * N and list(record.details["cells"]) == LABELS
    assert list(rows) == list(scores)
    assert rows.reply.equals(scores.reply) and (rows.nll / scores.nll - 1).abs().max() < 1e-3


def test_parts_of_an_older_version_are_refused(unscored, judge):
    key = grid.load_manifest(unscored)["parts"][0]
    rows = grid.read_part(unscored, key).drop(columns="forward_equivalents")
    grid.save_part(rows, unscored, key)
    with pytest.raises(InputError, match="run the grid again"):
        score_grid(unscored, judge=judge, progress=False)


def test_a_reply_without_tokens_is_scored(copied, judge):
    key = grid.load_manifest(copied)["parts"][0]
    rows = grid.read_part(copied, key)
    rows.at[0, "token_ids"], rows.at[0, "reply"], rows.at[0, "failed"] = [], "", True
    grid.save_part(rows, copied, key)
    scores = score_grid(copied, judge=judge, progress=False)
    failed = scores[scores.failed].iloc[0]
    assert failed.num_tokens == 0 and pd.isna(failed.nll) and scores.nll.isna().sum() == 1


def test_scores_need_the_same_data_and_model(scored, copied, judge, tmp_path):
    fewer = write_jsonl(load_corpus().dialogues[:200], tmp_path / "fewer.jsonl")
    with pytest.raises(InputError, match="not the data"):
        score_grid(scored, data=fewer, judge=judge, progress=False)
    copy = write_jsonl(load_corpus().dialogues, tmp_path / "copy.jsonl")
    assert len(score_grid(copied, data=copy, judge=judge, progress=False)) == 7 * N + 2 * N
    with pytest.raises(InputError, match="not the one that the grid ran on"):
        score_grid(scored, judge=judge, progress=False, chat=tiny_chat_model("gemma"))
    with pytest.raises(InputError, match="no such file: need the folder of a grid"):
        score_grid(tmp_path / "none", judge=judge)
    with pytest.raises(InputError, match="need one for act"):
        score_grid(scored, judge=make_judge(target="emotion"), progress=False)


def test_unlabelled_replies_cannot_be_targets(inputs, judge, tmp_path):
    bare = [replace(d, turns=tuple(replace(t, act=None) for t in d.turns)) for d in load_corpus()]
    data = str(write_jsonl(bare, tmp_path / "bare.jsonl"))
    with pytest.raises(InputError, match="has no act"):
        config = make_config(contexts={"data": data, "n": N})
        run_grid(config, tmp_path / "out", progress=False, inputs=inputs)
    plain = make_config(contexts={"data": data, "n": 2}, towards="all", cells=[{"method": "none"}])
    run_grid(plain, tmp_path / "out", progress=False)
    scores = score_grid(tmp_path / "out", judge=judge, progress=False)
    assert set(scores.cell) == {"unsteered"} and len(scores) == 2 * 4, "no act, no human row"


def test_a_cell_may_choose_its_model(exact, inputs, judge, tmp_path):
    other = tiny_chat_model(seed=1)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    model = str(tmp_path / "other")
    config = make_config(cells=[{"method": "none"}, {"method": ["none", "pplm"], "model": model}])
    run_grid(config, tmp_path / "out", progress=False, inputs=inputs)
    rows, labels = (
        read_parts(tmp_path / "out"),
        ["unsteered", f"unsteered, model {model}", f"PPLM, model {model}"],
    )
    plain, own = read_parts(exact).query("cell == 'unsteered'"), rows[rows.cell == labels[1]]
    assert list(dict.fromkeys(rows.cell)) == labels
    same(rows[rows.cell == "unsteered"], plain)
    assert differing_share(own.assign(cell="unsteered"), plain) > 0.5
    with pytest.raises(InputError, match="has its own model: leave chat out"):
        run_grid(config, tmp_path / "given", progress=False, inputs=inputs, chat=tiny_chat_model())
    scores = score_grid(tmp_path / "out", judge=judge, progress=False, records=tmp_path)
    token_ids, found = encode_replies(tiny_chat_model(), own.reply.tolist()), scores[scores.cell == labels[1]]
    expected = [len(ids) - (not end) for ids, end in zip(token_ids, own.stopped, strict=True)]
    assert found.num_tokens.tolist() == expected and found.nll.notna().all()
    record = RunRecord.load(tmp_path / "perturb" / "tiny.json")
    assert set(record.inputs) == {"model", f"model of {labels[1]}", f"head of {labels[2]}", "data", "judge"}
    assert (
        record.details["cells"][labels[2]]["model"] == model
        and "model" not in record.details["cells"]["unsteered"]
    )


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_a_cell_may_choose_its_adapter(exact, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(tiny_chat_model().model, lora).save_pretrained(tmp_path / "lora")
    adapter = str(tmp_path / "lora")
    config = make_config(cells=[{"method": "none", "adapter": adapter}, {"method": "none"}])
    run_grid(config, tmp_path / "out", progress=False)
    rows, label = read_parts(tmp_path / "out"), f"unsteered, adapter {adapter}"
    plain, own = rows[rows.cell == "unsteered"], rows[rows.cell == label]
    same(plain, read_parts(exact).query("cell == 'unsteered'"))
    assert differing_share(own.assign(cell="unsteered"), plain) > 0.5
    used = grid.load_manifest(tmp_path / "out")["about"]["inputs"]
    assert set(used) == {"model", f"model of {label}", "data"}


# --- annotation -------------------------------------------------------------------------------------------------

SOME = ["unsteered", "PPLM, layers upper", "guided decoding"]
CONTEXTS = {f"d{i}": (Turn(f"Shall we meet on day {i}?"),) for i in range(5)}


@pytest.fixture
def replies():
    rows = [
        (cell, dialogue, act, 0, f"reply {cell} {dialogue} {act}", judged)
        for cell in SOME
        for dialogue in CONTEXTS
        for act, judged in zip(ACTS, ("inform", "question", "inform", "inform"), strict=True)
    ]
    return pd.DataFrame(rows, columns=["cell", "dialogue_id", "target_class", "seed", "reply", "judged"])


def test_an_annotation_file_holds_as_many_of_each_cell_and_hides_them(replies):
    sample = sample_for_annotation(replies, CONTEXTS, n=12)
    assert list(sample) == ["row", "context", "reply", "label"] and sample.row.is_unique
    cells = sample.reply.map(replies.set_index("reply").cell)
    assert cells.value_counts().to_dict() == dict.fromkeys(SOME, 4)
    assert not cells.is_monotonic_increasing and set(sample.label) == {""}
    assert all(sample.row.str.fullmatch("[0-9a-f]{12}"))
    pd.testing.assert_frame_equal(sample, sample_for_annotation(replies, CONTEXTS, n=12))
    assert set(sample.row) != set(sample_for_annotation(replies, CONTEXTS, n=12, seed=1).row)


def test_labels_find_their_replies_in_any_order(replies, tmp_path):
    sample = sample_for_annotation(replies, CONTEXTS, n=30)
    asked = replies.set_index("reply").target_class
    filled = sample.assign(label=sample.reply.map(asked)).sample(frac=1, random_state=3)
    labels = read_annotation(save_annotation(filled, tmp_path / "s.csv"), ACT)
    labelled = join_annotation(replies.sample(frac=1, random_state=1), labels)
    assert len(labelled) == 30 and (labelled.label == labelled.target_class).all()
    found = annotation_agreement(labelled, ACTS)
    assert found["target_accuracy_by_annotator"].value == 1
    right = labelled.target_class.isin(["inform", "question"]).mean()
    assert found["target_accuracy_by_judge"].value == found["agreement"].value == pytest.approx(right)
    with pytest.raises(InputError, match="perhaps with labels"):
        save_annotation(filled, tmp_path / "s.csv")


def test_kappa_is_cohens(replies):
    labelled = replies.assign(label=["question"] * 30 + ["inform"] * 30)
    agreed = (labelled.label == labelled.judged).mean()
    chance = sum((labelled.label == act).mean() * (labelled.judged == act).mean() for act in ACTS)
    kappa = annotation_agreement(labelled, ACTS)["kappa"].value
    assert kappa == pytest.approx((agreed - chance) / (1 - chance))


@pytest.mark.parametrize(
    "text, told",
    [
        ("row,label\nabc,statement\n", ":2: label 'statement'"),
        ("row,label\nabc,inform\ndef,\n", ":3: label ''"),
        ("row,act\nabc,inform\n", "no column 'label'"),
        ("", "need the CSV file of `grid annotate`"),
    ],
)
def test_a_wrong_annotation_file_is_refused(tmp_path, text, told):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(InputError, match=told):
        read_annotation(tmp_path / "s.csv", ACT)


def test_labels_of_another_grid_are_refused(replies):
    labels = pd.DataFrame({"row": ["0" * 12], "label": ["inform"]})
    with pytest.raises(InputError, match="1 of 1 labels belong to no reply"):
        join_annotation(replies, labels)


@pytest.mark.parametrize("n", [0, 61])
def test_an_annotation_file_of_no_or_too_many_replies_is_refused(replies, n):
    with pytest.raises(InputError, match="need 1..60"):
        sample_for_annotation(replies, CONTEXTS, n)
