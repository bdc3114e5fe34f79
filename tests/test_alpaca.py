"""Tuning on instructions: an interrupted soft prompt goes on, files of one's own, answers that know their prompt."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from llama_dialogue.app.cli import main
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.generation_config import GenerationConfig
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.records import RunRecord
from llama_dialogue.sft import alpaca, training
from llama_dialogue.sft.alpaca_configs import KINDS, AlpacaConfig
from llama_dialogue.sft.instructions import Instruction, load_instructions

CONFIG = AlpacaConfig(
    model="tiny-llama-random", dtype="fp32", max_tokens=500, epochs=1.0, batch_size=8, save_steps=2
)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(kind, tmp_path, monkeypatch):
    config, base = CONFIG.override([f"tuning.kind={kind}"]), tiny_chat_model()
    _, record = alpaca.train_alpaca_job(config, tmp_path / "whole", progress=False, chat=base)
    usual = training._Clock.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Clock, "on_step_end", interrupt)
        alpaca.train_alpaca_job(config, tmp_path / "cut", progress=False, chat=base)
    assert not (tmp_path / "cut").exists()
    _, again = alpaca.train_alpaca_job(config, tmp_path / "cut", progress=False, chat=base)
    assert again.details["resumed_from"] == 4 and again.details["losses"] == record.details["losses"]
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] | weights[1])


def test_the_base_is_left_as_it_was(tmp_path):
    base = tiny_chat_model()
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    for kind in KINDS:
        alpaca.train_alpaca_job(
            CONFIG.override([f"tuning.kind={kind}"]), tmp_path / kind, progress=False, chat=base
        )
    after = dict(base.model.named_parameters())
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_attention_is_that_of_the_config_and_the_base_keeps_its_own(tmp_path, monkeypatch):
    base, asked = tiny_chat_model(), []
    usual = training.make_trainer

    def spy(network, *args):
        asked.append(network.get_base_model().config._attn_implementation)
        return usual(network, *args)

    monkeypatch.setattr(training, "make_trainer", spy)
    for attention in ("eager", "sdpa"):
        config = CONFIG.override([f"attention={attention}", "tuning.kind=prefix", "epochs=0.1"])
        alpaca.train_alpaca_job(config, tmp_path / attention, progress=False, chat=base)
    assert asked == ["eager", "sdpa"] and base.model.config._attn_implementation == "sdpa"


def test_ones_own_file_from_the_command_line_to_the_chat(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Say the number {n}.", "input": "", "output": f"{n}!"} for n in range(40)]
    (tmp_path / "my own.json").write_text(json.dumps(rows), encoding="utf-8")
    options = ["--model", "tiny-llama-random", "--kind", "prompt", "--epochs", "1", "--set", "dtype=fp32"]
    for _ in range(2):  # a second run over the first
        main(["alpaca", "train", "--data", "my own.json", "--out", "my model", "--records", "rec", *options])
    record = RunRecord.load(tmp_path / "rec" / "sft" / "alpaca.json")
    assert record.status == "done" and record.inputs["data"]["name"] == "my own"
    command = [sys.executable, "-c", "from llama_dialogue.app.cli import main; main()"]
    command += ["chat", "--model", "tiny-llama-random", "--adapter", "my model", "--set", "dtype=fp32"]
    done = subprocess.run(command, input=b"Say the number 3.\n/quit\n", capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1, done.stderr.decode()


def test_no_training_without_a_record_for_each_part(tmp_path):
    file = tmp_path / "one.json"
    file.write_text('[{"instruction": "Say hi.", "input": "", "output": "Hi."}]')
    with pytest.raises(InputError, match="1 records, none of at most 500 tokens for (training|validation)"):
        alpaca.train_alpaca_job(CONFIG.override([f"data={file}"]), tmp_path / "out", progress=False)


def test_damaged_weights_are_one_line(tmp_path):
    alpaca.train_alpaca_job(CONFIG, tmp_path / "out", progress=False)
    path = tmp_path / "out" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="missing or damaged"):
        alpaca.load_instructed(tmp_path / "out")


def test_answers_do_not_depend_on_the_batch(tmp_path):
    base = tiny_chat_model()
    tuned, _ = alpaca.train_alpaca_job(
        CONFIG.override(["tuning.kind=prefix"]), tmp_path / "out", progress=False, chat=base
    )
    asked = [Instruction("Say hi."), Instruction("Count to three, slowly.", "one, two"), Instruction("Stop.")]
    few = GenerationConfig(max_new_tokens=8, top_p=0.8)
    together = alpaca.follow(tuned, asked, few, seed=3)
    assert together == [alpaca.follow(tuned, [one], few, seed=3 + i)[0] for i, one in enumerate(asked)]


def test_the_sample_is_varied_and_whole():
    records = load_instructions("sample")
    first = [record.instruction.split()[0] for record in records]
    assert len(records) >= 150 and max(map(first.count, first)) <= 8
    korean = [r for r in records if any("가" <= c <= "힣" for c in r.instruction)]
    assert len(korean) >= 20 and len({r.instruction for r in records}) == len(records)
