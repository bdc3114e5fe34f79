"""Contexts: today's draw is that of the committed records, and the reserve is drawn by its key alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from llama_dialogue.core import contexts
from llama_dialogue.core.contexts import ContextConfig, draw_contexts, shared_contexts
from llama_dialogue.core.dialogues import (
    Corpus,
    load_corpus,
    make_examples,
    select_share,
    share_of,
    write_jsonl,
)
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.generation import derive_seed
from llama_dialogue.core.paths import checkout_dir
from llama_dialogue.core.records import results_dir

ROOT = checkout_dir()
CONTROL = yaml.safe_load((ROOT / "configs" / "reserved.yaml").read_text())["control"]
DAILYDIALOG = Path(os.environ.get("LLAMA_DIALOGUE_DATA", "")) / "dailydialog"
needs_dailydialog = pytest.mark.skipif(
    not (DAILYDIALOG / "test").is_dir() or not os.environ.get("LLAMA_DIALOGUE_DATA"),
    reason="needs dailydialog in LLAMA_DIALOGUE_DATA",
)
TEST = ContextConfig(data="dailydialog", split="test")


def refused(config, corpus=None) -> str:
    with pytest.raises(InputError) as caught:
        draw_contexts(config, corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(record) -> pd.DataFrame:
    return pd.read_parquet((results_dir() / record).with_suffix(".parquet"))


def drawn_ids(record) -> list[str]:
    return list(dict.fromkeys(rows_of(record).dialogue_id))


@pytest.fixture(scope="module")
def sample():
    return load_corpus("sample")


@pytest.fixture(scope="module")
def dailydialog():
    return load_corpus("dailydialog")


@pytest.fixture
def toy(sample, monkeypatch):
    "Reserve three test dialogues of the sample, two of them of share steer."
    test = [d.id for d in sample if d.split == "test"]
    steer = [i for i in test if share_of(i) == "steer"][:2]
    ids = steer + [next(i for i in test if share_of(i) != "steer")]
    monkeypatch.setattr(contexts, "_reserves", lambda: {"toy": {"data": "sample", "test": ids}})
    return ids


@pytest.mark.parametrize("share", ["steer", None])
@pytest.mark.parametrize("split", ["test", None])
@pytest.mark.parametrize("seed", [0, 1])
def test_draw_is_the_one_that_the_records_were_made_with(sample, share, split, seed):
    own = [d for d in sample if split in (None, d.split)]
    free = [e for e in make_examples(select_share(own, share) if share else own) if len(e.context) <= 5]
    one_each = {e.dialogue_id: e for e in sorted(free, key=lambda e: derive_seed(e.id, seed))}
    before = sorted(one_each.values(), key=lambda e: derive_seed(e.dialogue_id, seed))
    config = ContextConfig(split=split, share=share, n=len(before), max_context=5, seed=seed)
    assert draw_contexts(config) == draw_contexts(config, sample) == before


@needs_dailydialog
@pytest.mark.parametrize(
    "record, changes",
    {
        "perturb/test-dailydialog": {"n": 100},
        "perturb/screen-dailydialog": {"split": "validation"},
        "demo/dailydialog": {"n": 100},
        "prompting/dailydialog": {"n": 300, "share": None},
    }.items(),
)
def test_draw_of_the_committed_records(record, changes, dailydialog):
    examples = draw_contexts(replace(TEST, **changes), dailydialog)
    rows = rows_of(record)
    drawn = [e.dialogue_id for e in examples]
    if record.startswith("perturb"):
        assert set(drawn) == set(rows.dialogue_id)
    else:
        assert drawn == drawn_ids(record)
        places = rows.drop_duplicates("dialogue_id").position
        assert [len(e.context) for e in examples] == places.tolist()


@needs_dailydialog
def test_reserve_is_what_no_record_holds(dailydialog):
    if dailydialog.sha256 != CONTROL["sha256"]:
        pytest.skip("another copy of dailydialog")
    used = {i for ids in held_without_key().values() for i in ids}
    for split in ("validation", "test"):
        own = [d.id for d in dailydialog if d.split == split and share_of(d.id) == "steer"]
        assert CONTROL[split] == sorted(set(own) - used)


def held_without_key() -> dict[str, set[str]]:
    "The dialogues in the rows of every record whose config names no reserve."
    held = {}
    for path in results_dir().rglob("*.json"):
        record = json.loads(path.read_text())
        config = record["config"].get("contexts", record["config"])
        if record["rows"] and not config.get("reserve"):
            rows = pd.read_parquet(path.with_name(record["rows"]))
            held[record["study"], record["name"]] = set(rows.get("dialogue_id", ()))
    return held


def test_no_record_holds_a_reserved_dialogue():
    assert len(CONTROL["test"]) == 143 and len(CONTROL["validation"]) == 201
    reserved = set(CONTROL["test"]) | set(CONTROL["validation"])
    assert len(reserved) == 143 + 201 and {share_of(i) for i in reserved} == {"steer"}
    assert {name: ids & reserved for name, ids in held_without_key().items() if ids & reserved} == {}


@needs_dailydialog
def test_draw_of_the_real_reserve(dailydialog):
    told = refused(replace(TEST, n=200), dailydialog)
    assert "104 dialogues outside the reserve, 143 in it: need at most 104" in told
    assert "reserve: control in a config of that study" in told
    kept = draw_contexts(replace(TEST, n=143, reserve="control"), dailydialog)
    assert {e.dialogue_id for e in kept} == set(CONTROL["test"])
    for split, free in (("validation", 714 - 201), ("test", 706 - 143)):
        drawn = draw_contexts(replace(TEST, split=split, share=None, n=free, seed=1), dailydialog)
        assert not {e.dialogue_id for e in drawn} & set(CONTROL[split])


@needs_dailydialog
def test_corpus_with_a_test_part_only(tmp_path, dailydialog):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "test").symlink_to(DAILYDIALOG / "test")
    copy = replace(TEST, n=100, data=str(tmp_path / "copy"))
    assert draw_contexts(copy) == draw_contexts(replace(TEST, n=100), dailydialog)
    assert "104 dialogues outside the reserve" in refused(replace(copy, n=105))
    assert "split 'validation'" in refused(replace(copy, split="validation"))


def test_reserve_needs_its_key(sample, toy):
    there = len(draw_all(ContextConfig(split="test"), sample))
    told = refused(ContextConfig(split="test", n=there + 1), sample)
    assert f"sample, split test, share steer: {there} dialogues outside the reserve, 2 in it" in told
    assert "or reserve: toy in a config of that study" in told
    for share in ("steer", None):
        assert not {e.dialogue_id for e in draw_all(ContextConfig(share=share), sample)} & set(toy)


def draw_all(config, corpus):
    "Draw as many as there are."
    for n in range(len(corpus), 0, -1):
        try:
            return draw_contexts(replace(config, n=n), corpus)
        except InputError:
            continue


def test_key_draws_from_the_reserve_alone(sample, toy):
    config = ContextConfig(split="test", share=None, reserve="toy", n=3)
    assert {e.dialogue_id for e in draw_contexts(config)} == set(toy)
    assert {e.dialogue_id for e in draw_contexts(replace(config, share="steer", n=2))} == set(toy[:2])
    assert "3 dialogues in the reserve 'toy': need at most 3, e.g. n=3" in refused(replace(config, n=4))


def test_copy_of_the_reserve_alone(sample, toy, tmp_path):
    data = str(write_jsonl([d for d in sample if d.id in toy], tmp_path / "copy.jsonl"))
    told = refused(ContextConfig(data=data, n=1))
    assert "copy, share steer: 0 dialogues outside the reserve, 2 in it: need another split" in told
    assert draw_contexts(ContextConfig(data=data, split="test", reserve="toy", n=2))


def test_faulty_config():
    with pytest.raises(InputError, match="reserve='contrl': need one of control, e.g. 'control'"):
        ContextConfig(reserve="contrl", split="test")
    with pytest.raises(InputError, match="reserve=''"):
        ContextConfig(reserve="")
    with pytest.raises(InputError, match="split=None: reserve 'control' has validation and test"):
        ContextConfig(reserve="control")
    with pytest.raises(InputError, match="split='train': reserve 'control'"):
        ContextConfig.from_dict({"split": "train", "reserve": "control"})
    with pytest.raises(InputError, match="share='part'"):
        ContextConfig(share="part")
    with pytest.raises(InputError, match="n=0: need at least 1"):
        ContextConfig(n=0)


def test_reserve_with_another_corpus():
    told = refused(ContextConfig(split="test", reserve="control"))
    assert "sample, split test, share steer: 0 dialogues in the reserve 'control'" in told
    assert told.endswith("need dialogues of dailydialog, e.g. data=dailydialog, share=null")


def test_ten_dialogues(sample, tmp_path):
    ten = [replace(d, split="test") for d in sample.dialogues[:10]]
    data = str(write_jsonl(ten, tmp_path / "ten.jsonl"))
    steer = len(select_share(ten, "steer"))
    told = refused(ContextConfig(data=data))
    assert told == (
        f"n=24: ten, share steer: {steer} dialogues to draw from: need at most {steer}, e.g. n={steer}"
    )
    assert len(draw_contexts(ContextConfig(data=data, n=steer))) == steer
    assert len(draw_contexts(ContextConfig(data=data, share=None, n=10))) == 10
    assert "none of 10 dialogues is in split 'train'" in refused(ContextConfig(data=data, split="train"))
    none = Corpus("none", tuple(d for d in ten if share_of(d.id) != "steer"))
    assert refused(ContextConfig(), none).endswith("need another split or share, e.g. share=null")


def test_shared_contexts(tmp_path):
    table = shared_contexts().set_index(["first", "second"])
    assert table.loc[("demo/dailydialog", "perturb/test-dailydialog"), "shared"] == 100
    assert table.loc[("perturb/test-dailydialog", "prompting/dailydialog"), "n_second"] == 300
    assert table.loc[("perturb/labels-test-dailydialog", "perturb/test-dailydialog"), "split"] == "test"
    assert len(shared_contexts(results_dir() / "attribute")) == 0
    with pytest.raises(InputError, match="no record there"):
        shared_contexts(tmp_path)


def test_wheel_brings_the_reserve(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "-d",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    code = """if True:
        import sys
        from llama_dialogue.core.contexts import ContextConfig, draw_contexts, _reserves
        from llama_dialogue.core.paths import checkout_dir
        assert checkout_dir() is None
        print(draw_contexts(ContextConfig())[0].id, len(_reserves()["control"]["test"]))
        print(sorted({"torch", "pandas", "sklearn", "transformers"} & set(sys.modules)))"""
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [f"{draw_contexts(ContextConfig())[0].id} 143", "[]"], done.stderr
