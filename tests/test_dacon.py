"""Judgements: what is wrong with a file is one line, a killed training goes on, soft prompts keep their own size."""

import json
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from shell import run

from llama_dialogue.core.errors import InputError
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.paths import sample_dir
from llama_dialogue.dacon.configs import AnswerConfig
from llama_dialogue.dacon.predict import predict_file
from llama_dialogue.dacon.tuning import load_answers, train_answers_job

SHORT = [
    "--set",
    "steps=2",
    "--set",
    "max_tokens=700",
    "--set",
    "validation=0.3",
    "--model",
    "tiny-llama-random",
]


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("dacon") / "judge"
    config = AnswerConfig.from_dict({"steps": 2, "max_tokens": 700, "validation": 0.3})
    train_answers_job(config, out, None, False, tiny)
    return out


def broken(change):
    """Write the sample's cases with one change."""

    def write(path):
        table = pd.read_csv(sample_dir() / "cases.csv", dtype=str)
        change(table).to_csv(path, index=False)

    return write


def with_value(column, row, value):
    def change(table):
        table.loc[row, column] = value
        return table

    return broken(change)


BAD = {
    "no column": (broken(lambda t: t.drop(columns="second_party")), "no column 'second_party', found ID"),
    "label": (with_value("first_party_winner", 3, "2"), "row 4"),
    "one class": (broken(lambda t: t[t.first_party_winner == "1"]), "need cases of both outcomes"),
    "empty facts": (with_value("facts", 1, ""), "empty facts"),
    "ID twice": (with_value("ID", 1, "CASE_001"), "the ID of row 1 again"),
    "a party that is NaN": (with_value("first_party", 2, float("nan")), "empty first_party"),
    "ten rows of one outcome": (broken(lambda t: t[t.first_party_winner == "0"].head(10)), "both outcomes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_faulty_file_is_one_line(name, tmp_path, capsys):
    write, told = BAD[name]
    write(tmp_path / "a file.csv")
    out = tmp_path / "judge"
    code, _, err = run(
        ["dacon", "train", "--data", str(tmp_path / "a file.csv"), "--out", str(out), *SHORT], capsys
    )
    assert code == 2 and told in err and err.count("\n") == 1 and not out.exists()


def test_train_and_predict_with_the_commands(tmp_path, capsys):
    train, test, out = (tmp_path / "with a space" / name for name in ("train.csv", "test.csv", "judge"))
    train.parent.mkdir()
    table = pd.read_csv(sample_dir() / "cases.csv").head(30)
    table.to_csv(train, index=False)
    table.drop(columns="first_party_winner").tail(7).to_csv(test, index=False)
    for method in ("p", "prompt"):  # the second one replaces the first
        train_it = ["dacon", "train", "--data", str(train), "--out", str(out), "--method", method, *SHORT]
        code, told, err = run([*train_it, "--records", str(tmp_path)], capsys)
        assert code == 0, err
    sheet = tmp_path / "submission.csv"
    predict = ["dacon", "predict", "--model", str(out), "--test", str(test), "--out", str(sheet)]
    code, _, err = run([*predict, "--probabilities"], capsys)
    assert code == 0, err
    written = pd.read_csv(sheet)
    assert written.ID.tolist() == table.ID.tail(7).tolist()
    assert list(written.columns) == ["ID", "first_party_winner", "probability"]
    assert (written.first_party_winner == (written.probability > 0.5)).all()


def test_predict_before_training_writes_nothing(tmp_path, capsys):
    sheet = tmp_path / "submission.csv"
    predict = ["dacon", "predict", "--model", str(tmp_path / "none"), "--test", "sample", "--out", str(sheet)]
    code, _, err = run(predict, capsys)
    assert code == 2 and "nothing of `llama-dialogue dacon train` there" in err and not sheet.exists()


def test_another_base_or_another_number_of_virtual_tokens(trained, tmp_path, tiny):
    with pytest.raises(InputError, match="made on model"):
        load_answers(trained, tiny_chat_model(seed=3))
    other = tmp_path / "other"
    other.mkdir()
    for file in trained.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"num_virtual_tokens": 7}))
    with pytest.raises(InputError, match="do not fit its adapter_config.json"):
        load_answers(other, tiny)


KILLED = """
import os, signal, sys
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.dacon import tuning
from llama_dialogue.dacon.configs import AnswerConfig

loss = tuning._AnswerTrainer.compute_loss


def killed(self, model, inputs, *args, **kwargs):
    if self.model.training and self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, model, inputs, *args, **kwargs)


tuning._AnswerTrainer.compute_loss = killed
tuning.train_answers_job(AnswerConfig.from_yaml(sys.argv[1]), sys.argv[2], None, False, tiny_chat_model())
"""


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, tiny):
    config = AnswerConfig.from_dict(
        {
            "steps": 6,
            "save_steps": 2,
            "max_tokens": 700,
            "validation": 0.3,
            "tuning": {"kind": "p-tuning", "width": 16},
        }
    )
    whole, _ = train_answers_job(config, tmp_path / "whole", None, False, tiny)
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_dict()))
    how = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(tmp_path / "cut")]
    assert subprocess.run(how, capture_output=True).returncode == -signal.SIGKILL
    again, record = train_answers_job(config, tmp_path / "cut", None, False, tiny)
    assert record.details["resumed_from"] == 4
    for one, other in zip(whole.past, again.past, strict=True):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))


def test_three_labels(tmp_path, tiny):
    table = pd.read_csv(sample_dir() / "messages.csv")
    table.loc[table.text.str.contains(r"\?"), "label"] = "question"
    table.to_csv(tmp_path / "three.csv", index=False)
    of_table = {"data": str(tmp_path / "three.csv"), "text_column": "text", "label_column": "label"}
    config = AnswerConfig.from_dict(of_table | {"steps": 2, "validation": 0.3})
    tuned, record = train_answers_job(config, tmp_path / "three", None, False, tiny)
    assert tuned.labels == ("complaint", "no complaint", "question")
    assert set(record.details["data"]["answers"]["train"]) == set(tuned.labels)
    written = predict_file(tmp_path / "three", of_table["data"], tmp_path / "out.csv", True, chat=tiny)
    assert set(written.label) <= set(tuned.labels) and written.probability.between(1 / 3, 1).all()


def test_any_table_of_texts(tmp_path, tiny):
    config = AnswerConfig.from_dict(
        {"text_column": "text", "label_column": "label", "steps": 2, "validation": 0.3}
        | {
            "tuning": {
                "kind": "prompt",
                "virtual_tokens": 8,
                "init_text": "Classify if the tweet is a complaint or not:",
            }
        }
    )
    train_answers_job(config, tmp_path / "complaints", None, False, tiny)
    table = predict_file(tmp_path / "complaints", "sample", tmp_path / "out.csv", progress=False, chat=tiny)
    assert len(table) == 60 and set(table.label) <= {"complaint", "no complaint"}
