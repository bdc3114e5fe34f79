"""Records: damaged, foreign or unwritable ones are refused in one line, and nothing is left half-written."""

import json
from pathlib import Path

import pytest

from llama_dialogue.core.errors import InputError
from llama_dialogue.core.records import RunRecord, check_rendered, records_table, rendered_from, start_run
from llama_dialogue.core.statistics import Interval


@pytest.fixture
def path(tmp_path):
    record = RunRecord(
        study="perturb",
        name="demo",
        config={"n": 12},
        seed=0,
        metrics={"accuracy": Interval(0.5, 0.2, 0.8, 12)},
    )
    return record.save(tmp_path / "perturb" / "demo.json")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(path) -> str:
    with pytest.raises(InputError) as caught:
        RunRecord.load(path)
    told = str(caught.value)
    assert "\n" not in told and path.name in told
    return told


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_other_schema(path, schema):
    edit(path, schema_version=schema)
    assert f"schema_version={schema!r}: need 1" in refused(path)


def test_unknown_field_names_the_nearest(path):
    edit(path, sead=0)
    assert "unknown field 'sead'" in (told := refused(path)) and told.endswith("e.g. 'seed'")


def test_missing_field(path):
    stored = json.loads(path.read_text())
    del stored["seed"]
    path.write_text(json.dumps(stored))
    assert "seed missing" in refused(path)


def test_unknown_status(path):
    edit(path, status="don")
    assert "status='don'" in (told := refused(path)) and told.endswith("e.g. 'done'")


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


def test_table_does_not_skip_a_damaged_record(path):
    assert len(records_table(path.parent)) == 1
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
    record.metrics["accuracy"] = float("nan")
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
