"""Records: damaged, foreign or unwritable ones are refused in one line, old ones read, and nothing is left half-written."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from llama_dialogue.core.errors import InputError
from llama_dialogue.core.migration import cell_label, migrate, migrate_rows
from llama_dialogue.core.records import RunRecord, load_rows, results_dir, save_rows, start_run
from llama_dialogue.core.rendered import check_rendered, records_table, rendered_from
from llama_dialogue.core.statistics import Interval
from llama_dialogue.perturb.configs import BenchConfig

CONFIGS = results_dir().parents[1] / "configs"


@pytest.fixture
def path(tmp_path):
    record = RunRecord(
        study="perturb",
        name="demo",
        config={"contexts": {"n": 12}},
        seed=0,
        scores={"unsteered": {"accuracy": Interval(0.5, 0.2, 0.8, 12)}},
    )
    return record.save(tmp_path / "perturb" / "demo.json")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(path, field):
    stored = json.loads(path.read_text())
    del stored[field]
    path.write_text(json.dumps(stored))


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        RunRecord.load(path)
    told = str(caught.value)
    assert "\n" not in told and path.name in told
    return told


@pytest.mark.parametrize("schema", [0, "1", None, True, 2.0])
def test_no_schema(path, schema):
    edit(path, schema_version=schema)
    assert f"schema_version={schema!r}: need 1 to 2" in refused(path)


def test_newer_schema(path):
    edit(path, schema_version=3, tomorrow="yes")
    assert "schema_version=3: need at most 2; update llama_dialogue" in refused(path)


def test_unknown_field_names_the_nearest(path):
    edit(path, sead=0)
    assert "unknown field 'sead'" in (told := refused(path)) and told.endswith("e.g. 'seed'")


@pytest.mark.parametrize("field", ["study", "name", "config", "seed"])
def test_missing_field(path, field):
    drop(path, field)
    assert f"{field} missing" in refused(path)


@pytest.mark.parametrize(
    "field", ["job", "status", "inputs", "details", "seconds", "versions", "machine", "rows", "notes"]
)
def test_missing_optional_field_has_its_default(path, field):
    drop(path, field)
    assert RunRecord.load(path) == RunRecord(
        study="perturb",
        name="demo",
        config={"contexts": {"n": 12}},
        seed=0,
        scores={"unsteered": {"accuracy": Interval(0.5, 0.2, 0.8, 12)}},
    )


def test_no_circumstances_are_made_up(path):
    drop(path, "versions")
    assert RunRecord.load(path).versions == {}


def test_unknown_status(path):
    edit(path, status="don")
    assert "status='don'" in (told := refused(path)) and told.endswith("e.g. 'done'")


@pytest.mark.parametrize("field", ["config", "inputs", "scores", "details"])
def test_no_mapping(path, field):
    edit(path, **{field: [1]})
    assert f"{field}=[1]: need a mapping" in refused(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated(path, share):
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    assert "no JSON" in refused(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff\xfe"])
def test_not_a_record(path, content):
    path.write_bytes(content)
    refused(path)


def test_missing_file(tmp_path):
    assert "FileNotFoundError" in refused(tmp_path / "none.json")


def test_inputs_by_role(tmp_path):
    class Thing:
        name, sha256 = "head-steering", "a" * 64

    given = {"data": {"name": "sample", "sha256": "b" * 64, "size": 3}, "judge": None}
    with start_run("perturb", "demo", {}, seed=0, inputs=given, folder=tmp_path, job="grid") as record:
        record.add_input("head", Thing)
        record.add_input("adapter", None)
    again = RunRecord.load(tmp_path / "perturb" / "demo.json")
    assert again.inputs == {
        "data": {"name": "sample", "sha256": "b" * 64},
        "head": {"name": "head-steering", "sha256": "a" * 64},
    }
    assert again.job == "grid" and again.versions["python"] and again.machine["cores"]


def test_table_does_not_skip_a_damaged_record(path):
    assert records_table(path.parent)["unsteered.accuracy"].astype(float).tolist() == [0.5]
    (path.parent / "cut.json").write_text('{"schema_version": 1,')
    with pytest.raises(InputError, match="cut.json"):
        records_table(path.parent)


def test_table_of_nothing(tmp_path):
    with pytest.raises(InputError, match="no record there"):
        records_table(tmp_path)


def test_file_in_the_way(tmp_path):
    (tmp_path / "perturb").write_text("a file")
    with pytest.raises(InputError), start_run("perturb", "demo", {}, seed=0, folder=tmp_path):
        pytest.fail("the run began before the folder was checked")
    assert (tmp_path / "perturb").read_text() == "a file"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder where nobody may write, not even root")
def test_forbidden_folder():
    with (
        pytest.raises(InputError, match="/proc"),
        start_run("perturb", "demo", {}, seed=0, folder="/proc/runs"),
    ):
        pytest.fail("the run began before the folder was checked")


def test_failed_save_keeps_the_old_record(path):
    before = path.read_text()
    record = RunRecord.load(path)
    record.scores["unsteered"]["accuracy"] = float("nan")
    with pytest.raises(ValueError):
        record.save(path)
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["demo.json"]


def test_failed_run_keeps_the_old_record(path, tmp_path):
    with pytest.raises(ZeroDivisionError), start_run("perturb", "demo", {}, seed=1, folder=tmp_path):
        raise ZeroDivisionError
    assert RunRecord.load(path).seed == 0


def test_wrong_input_leaves_no_record(tmp_path):
    with pytest.raises(InputError), start_run("perturb", "demo", {}, seed=0, folder=tmp_path):
        raise InputError("n=0: need n >= 1, e.g. 12")
    assert not list(tmp_path.rglob("*.json"))


@pytest.fixture
def notebook(path, tmp_path, capsys):
    rendered_from([path], tmp_path)
    output = {
        "output_type": "stream",
        "name": "stdout",
        "text": capsys.readouterr().out.splitlines(keepends=True),
    }
    notebook = tmp_path / "study.ipynb"
    notebook.write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [output]}]}))
    return notebook


def test_rendered_from_todays_record(notebook, path, tmp_path):
    assert check_rendered(notebook, tmp_path) == ["perturb/demo.json"]
    record = RunRecord.load(path)
    record.seed = 1
    record.save(path)
    with pytest.raises(
        InputError, match="study.ipynb: rendered from perturb/demo.json .* run the notebook again"
    ):
        check_rendered(notebook, tmp_path)


def test_rendered_from_a_lost_record(notebook, path, tmp_path):
    path.unlink()
    with pytest.raises(InputError, match="no such record"):
        check_rendered(notebook, tmp_path)


def test_notebook_that_does_not_tell(tmp_path):
    (tmp_path / "study.ipynb").write_text('{"cells": []}')
    with pytest.raises(InputError, match="no output of rendered_from"):
        check_rendered(tmp_path / "study.ipynb", tmp_path)


# Schema 1: what it wrote is read as schema 2.

COMMITTED = sorted(results_dir().rglob("*.json"))
OLD = [path for path in COMMITTED if json.loads(path.read_text())["schema_version"] == 1]


def named(path) -> str:
    return path.relative_to(results_dir()).with_suffix("").as_posix()


def raw(name) -> dict:
    return json.loads((results_dir() / f"{name}.json").read_text())


def loaded(name) -> RunRecord:
    return RunRecord.load(results_dir() / f"{name}.json")


def leaves(value) -> Counter:
    "Count the numbers and words of nested plain data."
    if isinstance(value, dict | list):
        return sum(map(leaves, value.values() if isinstance(value, dict) else value), Counter())
    return Counter([repr(value)])


def intervals(value) -> Counter:
    "Count the intervals of nested plain data."
    if not isinstance(value, dict):
        return Counter()
    if set(value) == {"value", "low", "high", "n"}:
        return Counter([json.dumps(value)])
    return sum(map(intervals, value.values()), Counter())


@pytest.mark.parametrize("path", COMMITTED, ids=named)
def test_committed_record_reads_and_round_trips(path, tmp_path):
    before = path.read_bytes()
    record = RunRecord.load(path)
    assert record.schema_version == 2 and record.job and record.name == path.stem
    assert record.status == "done" and (record.scores or record.details)
    for role, thing in record.inputs.items():
        assert set(thing) == {"name", "sha256"} and len(thing["sha256"]) == 64, role
    again = RunRecord.load(record.save(tmp_path / path.name))
    assert again == record and migrate(again.to_dict()) == record.to_dict()
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", OLD, ids=named)
def test_migration_is_pure_and_loses_no_score(path):
    old = json.loads(path.read_text())
    new = migrate(old)
    assert old == json.loads(path.read_text()) and migrate(new) == new
    assert intervals(new["scores"]) == intervals(old["metrics"]) and not intervals(new["details"])
    unchanged = set(old) & set(new) - {"schema_version", "name", "config", "notes"}
    assert unchanged >= {"study", "status", "seed", "seconds", "versions", "git_commit", "machine", "rows"}
    assert all(new[field] == old[field] for field in unchanged)


@pytest.mark.parametrize("path", [p for p in OLD if p.parent.name == "attribute"], ids=named)
def test_migration_of_attribute_records_keeps_every_value(path):
    old, new = json.loads(path.read_text()), migrate(json.loads(path.read_text()))
    assert leaves(old["metrics"]) == leaves([new["scores"], new["details"]])
    gone = leaves(old["config"]) - leaves(new["config"])
    assert not gone - Counter([repr("together-act-dailydialog")])


@pytest.mark.parametrize(
    "name", ["head-act-dailydialog", "head-act-dailydialog-steering", "judge-act-dailydialog-part"]
)
def test_scores_of_a_head_or_judge(name):
    old, new = raw(f"attribute/{name}"), loaded(f"attribute/{name}")
    assert new.job == name.partition("-")[0]
    for score in ("accuracy", "macro_f1", "f1_question", "ece", "nll"):
        assert new.scores["this model"][score].to_dict() == old["metrics"][score]
        assert new.scores["words"][score].to_dict() == old["metrics"]["words"][score]
    assert new.details["n"] == old["metrics"]["n"] and new.details["overlap"] == old["metrics"]["overlap"]
    examples = new.config["examples"]
    assert examples["share"] == old["config"]["part"] and examples["data"] == "dailydialog"
    assert new.inputs["data"] == old["data"]
    assert new.inputs["encoder" if new.job == "judge" else "model"] == old["model"]


def test_head_and_its_candidates():
    old, new = raw("attribute/head-act-dailydialog"), loaded("attribute/head-act-dailydialog")
    assert (new.details["layer"], new.details["pooling"]) == (18, "steering")
    assert new.scores["final"]["accuracy"].value == 0.725
    assert new.scores["candidates"] == old["metrics"]["candidates"]
    assert new.scores["curve"]["29573"].to_dict() == old["metrics"]["curve"]["29573"]
    assert new.scores["by_prefix"]["0"].to_dict() == old["metrics"]["by_prefix"]["0"]
    assert new.config["layers"] == [14, 16, 18, 20, 22, 24, 26] and new.config["curve"][-1] == 1.0


def test_judge_has_two_configs():
    new = loaded("attribute/judge-emotion-dailydialog")
    assert set(new.config) == {"name", "examples", "judge"}
    assert new.config["examples"]["target"] == "emotion" and "target" not in new.config["judge"]
    assert new.config["judge"]["decide"] == "macro_f1" and new.config["judge"]["learning_rate"] == 1e-4
    assert new.details["calibration"] == {"prior_share": 0.55, "temperature": 1.3527}
    assert new.scores["validation"] == {"balanced_accuracy": 0.4431, "macro_f1": 0.4426}


def test_agreement_has_its_new_name():
    old = raw("attribute/head-judge-agreement-act-dailydialog")
    new = loaded("attribute/head-judge-agreement-act-dailydialog")
    assert old["name"] == "together-act-dailydialog"
    assert new.name == new.config["name"] == "head-judge-agreement-act-dailydialog"
    assert new.scores["both"]["agreement"].to_dict() == old["metrics"]["agreement"]
    assert new.scores["other"]["accuracy"].to_dict() == old["metrics"]["other"]["accuracy"]
    assert new.config["keep_train_duplicates"] is False and new.config["other"] == "runs/head-act"
    assert loaded("attribute/judge-act-dailydialog-known").config["keep_train_duplicates"] is True


def test_probes():
    old, new = raw("attribute/probe-act-dailydialog"), loaded("attribute/probe-act-dailydialog")
    score = new.scores["chat"]["steering"]["18"]["balanced_accuracy"]
    assert score.to_dict() == old["metrics"]["chat"]["steering"]["18"]["balanced_accuracy"]
    assert new.details["n"]["test"] == 768 and new.config["settings"] == ["chat", "alone"]


def test_timings():
    old, new = raw("attribute/bench-features"), loaded("attribute/bench-features")
    assert new.scores["batched"] == old["metrics"]["batched"] and new.details["n"]["replies"] == 418
    old, new = raw("perturb/bench"), loaded("perturb/bench")
    assert new.scores == old["metrics"] and new.job == "bench"
    assert BenchConfig.from_dict(new.config) == BenchConfig.from_yaml(CONFIGS / "perturb" / "bench.yaml")
    assert new.notes == old["notes"] and new.inputs == {"model": old["model"]}


def test_vectors_and_offsets():
    old, new = raw("perturb/vectors-dailydialog"), loaded("perturb/vectors-dailydialog")
    assert new.scores == {} and new.details == old["metrics"]
    assert set(new.config) == set("name data split share n model dtype system seed".split())
    old, new = raw("perturb/offsets-dailydialog"), loaded("perturb/offsets-dailydialog")
    assert new.details == old["metrics"] and new.config["head"] == "runs/head-steering"
    assert new.config["pplm"] == {"layers": "upper", "step_size": 0.2, "num_iterations": 3}
    assert new.config["decoding"] == {"max_new_tokens": 20} and new.config["max_context"] == 9


def test_prompting():
    old, new = raw("prompting/dailydialog"), loaded("prompting/dailydialog")
    for system in old["config"]["systems"]:
        assert new.scores[system]["ai_talk"].to_dict() == old["metrics"][system]["ai_talk"]
    assert new.config["contexts"] == {
        "data": "dailydialog",
        "split": "test",
        "share": None,
        "n": 300,
        "max_context": 9,
        "seed": 0,
    }
    assert new.config["decoding"]["max_new_tokens"] == 48 and new.config["seed"] == 0


@pytest.mark.parametrize(
    "method,label",
    [
        ("none", "unsteered"),
        ("prompt", "instruction in the prompt"),
        ("best_of_n", "best of 8"),
        ("pplm", "PPLM"),
        ("human", "human"),
    ],
)
def test_demo(method, label):
    old, new = raw("demo/dailydialog"), loaded("demo/dailydialog")
    assert new.scores[label]["accuracy"].to_dict() == old["metrics"][method]["accuracy"]
    assert new.config["contexts"]["n"] == 100 and new.config["contexts"]["share"] == "steer"
    assert new.config["cells"][0] == {"method": "none"} and new.config["decoding"]["max_new_tokens"] == 20
    assert label in ("human", *new.details["cells"]) and new.inputs["data"] == old["data"]


def test_hashes_in_the_notes_of_a_demo_are_inputs():
    old = raw("demo/dailydialog")
    shas = {"pplm": "a" * 64, "vector_best_of_n": "c" * 64}
    told = ", ".join(f"{method} by {sha}" for method, sha in shas.items())
    new = migrate(old | {"notes": f"sha256: {told}, judge {'b' * 64}"})
    assert new["inputs"]["head"] == {"name": "default", "sha256": "a" * 64}
    assert new["inputs"]["judge"] == {"name": "default", "sha256": "b" * 64}
    assert "vectors" not in new["inputs"] and new["notes"] == ""
    assert migrate(old | {"notes": "by hand"})["notes"] == "by hand"


@pytest.mark.parametrize("name", ["screen-dailydialog", "test-dailydialog"])
def test_grid(name):
    old, new = raw(f"perturb/{name}"), loaded(f"perturb/{name}")
    steerers = old["metrics"]["steerers"]
    assert new.inputs["head"] == {"name": "head-steering", "sha256": steerers["pplm"]}
    assert new.inputs["vectors"] == {"name": "vectors", "sha256": steerers["vector"]}
    assert new.inputs["offsets"] == {"name": "offsets", "sha256": steerers["distilled"]}
    assert new.inputs["judge"] == {"name": "judge-act-part", "sha256": old["metrics"]["judge_sha256"]}
    assert new.scores["human"]["accuracy"].to_dict() == old["metrics"]["human_ceiling"]
    assert new.details["grid"] == old["metrics"]["grid"]
    assert list(new.details["cells"]) == [cell_label(cell) for cell in old["metrics"]["cells"]]
    assert len(new.details["cells"]) == len(old["metrics"]["cells"])
    assert (new.config["target"], new.config["towards"]) == ("act", "all")
    assert new.config["contexts"] | {"share": "steer", "max_context": 9, "seed": 0} == new.config["contexts"]
    assert new.config["inputs"]["vectors"] == "runs/vectors" and new.config["judge"] == "runs/judge-act-part"
    assert {"method": "guided", "guided": {"strength": 4}} in new.config["cells"] or name.startswith("screen")


def test_cells_of_a_grid():
    cells = loaded("perturb/test-dailydialog").details["cells"]
    mixed = cells["best of 8, steering vector, layer 25, strength 0.1"]
    assert mixed["method"] == "best_of_n" and mixed["best_of_n"] == {"of": "vector", "n": 8}
    assert mixed["vector"] == {"layer": 25, "strength": 0.1} and "pplm" not in mixed
    assert cells["PPLM, layers upper, step size 0.2"]["pplm"] == {
        "layers": "upper",
        "step_size": 0.2,
        "num_iterations": 3,
        "gm_scale": 0.95,
        "kl_scale": 0.01,
        "batch_size": 100,
    }
    assert cells["unsteered"]["decoding"]["top_k"] == 10 and cells["unsteered"]["system"] == "speaker"


def test_options_that_a_grid_shared_go_to_the_methods_that_have_them():
    old = raw("perturb/test-dailydialog")
    old["config"] |= {
        "steering": {"max_new_tokens": 24, "gm_scale": 0.9, "best_of": 4, "system": "friend"},
        "cells": [{"method": "none"}, {"method": "pplm", "step_size": [0.1, 0.2]}, {"method": "best_of_n"}],
    }
    config = migrate(old)["config"]
    assert config["system"] == "friend" and config["pplm"] == {"gm_scale": 0.9}
    assert config["decoding"] == {"max_new_tokens": 24, "batch_size": 100}, "all rows of a part, as they ran"
    assert config["cells"] == [
        {"method": "none"},
        {"method": "pplm", "pplm": {"step_size": [0.1, 0.2]}},
        {"method": "best_of_n", "best_of_n": {"of": "none", "n": 4}},
    ]


def test_annotation():
    old, new = raw("perturb/labels-test-dailydialog"), loaded("perturb/labels-test-dailydialog")
    assert new.scores["steered"]["kappa"].to_dict() == old["metrics"]["steered"]["kappa"]
    share = new.scores["all"]["target_accuracy_by_annotator"]
    assert share.to_dict() == old["metrics"]["all"]["wanted_by_person"]
    assert new.details == {"confusion": old["metrics"]["confusion"]}


@pytest.mark.parametrize(
    "old,label",
    [
        ("none", "unsteered"),
        ("human", "human"),
        ("vector vector_layer=25 vector_strength=0.1", "steering vector, layer 25, strength 0.1"),
        ("distilled distilled_strength=500", "offsets, strength 500"),
        ("guided guide_strength=4", "guided decoding, strength 4"),
        ("pplm layers=upper step_size=0.2", "PPLM, layers upper, step size 0.2"),
        (
            "pplm layers=all step_size=0.1 num_iterations=5",
            "PPLM, layers all, step size 0.1, 5 iterations",
        ),
        ("pplm layers=20-30 gm_scale=0.9", "PPLM, layers 20-30, gm scale 0.9"),
        ("best_of_n best_of=16", "best of 16"),
        ("prompt_best_of_n best_of=16", "best of 16, instruction in the prompt"),
        (
            "guided_best_of_n guide_strength=1 best_of=8",
            "best of 8, guided decoding, strength 1",
        ),
        ("somebody's own", "somebody's own"),
    ],
)
def test_cell_label(old, label):
    assert cell_label(old) == label and cell_label(label) == label


@pytest.mark.parametrize("name", ["perturb/screen-dailydialog", "perturb/test-dailydialog"])
def test_old_rows(name):
    path = results_dir() / f"{name}.parquet"
    old, new = pd.read_parquet(path), load_rows(path)
    assert set(old) - set(new) == {"act", "forwards"}
    assert set(new) - set(old) == {"target_class", "forward_equivalents"}
    assert list(new.target_class) == list(old.act) and new.reply.equals(old.reply)
    assert list(dict.fromkeys(new.cell)) == [*loaded(name).details["cells"], "human"]
    assert migrate_rows(new) is new


def test_old_rows_of_the_demo_and_of_labels():
    demo = load_rows(results_dir() / "demo" / "dailydialog.parquet")
    assert [*demo.cell.unique(), "human"] == list(loaded("demo/dailydialog").scores)
    assert {"target_class", "judge_inform", "nll"} <= set(demo)
    labels = load_rows(results_dir() / "perturb" / "labels-test-dailydialog.parquet")
    assert list(labels) == ["cell", "dialogue_id", "target_class", "seed", "label", "judged"]


def test_new_rows_are_left_alone(tmp_path):
    rows = pd.DataFrame({"cell": ["none", "human"], "target_class": ["fear", "fear"], "reply": ["a", "b"]})
    assert load_rows(save_rows(rows, tmp_path / "new.parquet")).equals(rows)
    assert load_rows(results_dir() / "prompting" / "dailydialog.parquet").system.iloc[0] == "none"


@pytest.mark.parametrize(
    "changes,seen",
    [
        ({"metrics": None}, "metrics=None: need a whole record of schema 1"),
        ({"config": [1]}, "config=[1]: need a whole record"),
        ({"study": "cooking"}, "study='cooking' with config"),
        ({"sead": 1}, "unknown field 'sead'"),
        ({"status": "don"}, "status='don'"),
    ],
)
def test_damaged_old_record(tmp_path, changes, seen):
    (tmp_path / "old.json").write_text(json.dumps(raw("perturb/test-dailydialog") | changes))
    assert seen in refused(tmp_path / "old.json")


def test_old_record_without_metrics(tmp_path):
    old = raw("prompting/dailydialog")
    del old["metrics"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert "metrics missing: need a whole record" in refused(tmp_path / "old.json")


@pytest.mark.parametrize("path", OLD, ids=named)
def test_old_record_of_a_run_that_failed_reads(path, tmp_path):
    old = json.loads(path.read_text()) | {"status": "failed", "metrics": {}, "model": None}
    (tmp_path / "old.json").write_text(json.dumps(old))
    record = RunRecord.load(tmp_path / "old.json")
    assert record.status == "failed" and record.scores == {} and "model" not in record.inputs


def test_input_without_its_hash(path):
    edit(path, inputs={"head": {"name": "head"}})
    assert "inputs.head={'name': 'head'}: need name and sha256" in refused(path)


@pytest.mark.parametrize("path", OLD, ids=named)
@pytest.mark.parametrize("value", [None, 3, "x", [], [1], {}, {"x": 1}], ids=str)
def test_old_record_with_a_damaged_value_reads_or_is_refused(path, value, tmp_path):
    old, copy = json.loads(path.read_text()), tmp_path / "old.json"
    for part in ("config", "metrics"):
        for key in old[part]:
            copy.write_text(json.dumps(old | {part: old[part] | {key: value}}))
            try:
                RunRecord.load(copy)
            except InputError as error:
                assert "\n" not in str(error) and "old.json" in str(error)


def test_unknown_method_in_an_old_cell(tmp_path):
    old = raw("perturb/test-dailydialog")
    old["config"]["cells"][0] = {"method": "hypnosis"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert "method='hypnosis'" in refused(tmp_path / "old.json")
