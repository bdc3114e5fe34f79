"""What the docs say is what the records hold."""

import re

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

from llama_dialogue.attribute.training import reader_card
from llama_dialogue.core.records import RunRecord, load_rows, results_dir
from llama_dialogue.core.rendered import check_rendered

CFG = get_config()
STUDIES = [p for p in nbglob(as_path=True).sorted() if p.stem.endswith("_study") or p.name == "index.ipynb"]
CARDS = sorted((results_dir() / "attribute").glob("*.md"))
RECORDS = sorted(results_dir().rglob("*.json"))


@pytest.mark.parametrize("notebook", STUDIES, ids=lambda p: p.relative_to(CFG.nbs_path).as_posix())
def test_rendered_from_todays_records(notebook):
    assert check_rendered(notebook.absolute())


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.relative_to(results_dir()).as_posix())
def test_record_is_whole_and_has_its_config(path):
    record = RunRecord.load(path)
    assert record.status == "done" and record.job and (record.scores or record.details)
    assert {"model", "encoder", "data"} & set(record.inputs)
    files = [CFG.config_path / "configs" / path.parent.name / f"{path.stem}.yaml"]
    files += [CFG.config_path / "configs" / "embedded" / f"{path.stem.removeprefix('embedded-')}.yaml"]
    assert any(file.exists() for file in files)
    if record.rows:
        rows = load_rows(path.with_name(record.rows))
        assert len(rows) and not {"context", "text", "act"} & set(rows.columns)


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.name)
def test_card_says_what_its_record_says(path):
    record = RunRecord.load(path.with_suffix(".json"))
    assert path.read_text(encoding="utf-8") == reader_card(record)


def test_figures_that_the_docs_show_exist():
    shown = [
        CFG.config_path / "figures" / name
        for notebook in nbglob(as_path=True)
        for name in re.findall(r"figures/([\w-]+\.png)", notebook.read_text(encoding="utf-8"))
    ]
    assert [path for path in shown if not path.exists()] == []
