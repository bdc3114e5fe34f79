"""Personas: what is wrong with pairs is one line, a killed training goes on, a server's faults lose nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shell import launched, run

from llama_dialogue.core.errors import InputError
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.paths import sample_dir
from llama_dialogue.dpo.configs import MakePairsConfig, PersonaConfig
from llama_dialogue.dpo.make_pairs import make_pairs_job
from llama_dialogue.dpo.pairs import load_pairs
from llama_dialogue.dpo.writers import ServerWriter
from llama_dialogue.sft.adapters import load_adapter

TINY = ["--model", "tiny-llama-random", "--set", "max_tokens=1200", "--set", "dialogues=0"]
SITUATIONS = [json.loads(line) for line in (sample_dir() / "personas.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model(num_layers=2)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def without(kind):
    row = json.loads(json.dumps(SITUATIONS[1]))
    row["answers"].pop(kind)
    return row


PAIR = {"id": "a", "situation": "It rains.", "chosen": "Lovely!", "rejected": "I packed an umbrella."}
BAD = {
    "a type is missing": (lines([SITUATIONS[0], without("ESFP")]), "line 2: no answer of ESFP"),
    "empty": ("", "empty: need at least three situations"),
    "alike": (lines([PAIR | {"id": str(i), "rejected": "Lovely!"} for i in range(3)]), "line 1: chosen and"),
    "half a line": (lines(SITUATIONS[:3]) + '{"id": "x", "situ', "line 4: not JSON"),
    "an id twice": (lines([PAIR, PAIR, PAIR]), "id a stands there 3 times"),
    "two pairs": (lines([PAIR, PAIR | {"id": "b"}]), "need at least three"),
    "no test part": (lines([PAIR | {"id": str(i), "split": "train"} for i in range(5)]), "no pair in split"),
    "a split": (lines([PAIR | {"split": "dev"}]), "split='dev'"),
}


@pytest.mark.parametrize("name", BAD)
def test_faulty_pairs_are_one_line(name, tmp_path, capsys):
    text, told = BAD[name]
    (tmp_path / "my pairs.jsonl").write_text(text)
    out = tmp_path / "persona"
    train = ["dpo", "train", "--type", "INFP", "--data", str(tmp_path / "my pairs.jsonl"), "--out", str(out)]
    code, _, err = run([*train, *TINY], capsys)
    assert code == 2 and told in err and err.count("\n") == 1 and not out.exists()


def test_an_unknown_type_is_told_with_the_nearest(capsys):
    code, _, err = run(["dpo", "train", "--type", "ENFX"], capsys)
    assert code == 2 and "nearest: ENF" in err and "ISTJ" in err


def test_the_original_arguments(tmp_path):
    home = Path(__file__).parent.parent
    how = [
        "--dataset_dir",
        "sample",
        "--beta",
        "0.2",
        "--output_dir",
        str(tmp_path / "a persona"),
        "--epoch",
        "1",
    ]
    short = [f"--set={value}" for value in ("steps=1", "max_tokens=1200", "dialogues=0")]
    more = ["--mbti", "estj", "--model", "tiny-llama-random", "--records", str(tmp_path), *short]
    done = subprocess.run([sys.executable, home / "trainer.py", *how, *more], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "dpo" / "estj.json").read_text())
    assert (record["config"]["beta"], record["config"]["type"]) == (0.2, "ESTJ")


KILLED = """
import os, signal, sys
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.dpo import training
from llama_dialogue.dpo.configs import PersonaConfig

loss = training._PairTrainer._compute_loss


def killed(self, model, inputs, return_outputs):
    if self.model.training and self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, model, inputs, return_outputs)


training._PairTrainer._compute_loss = killed
config = PersonaConfig.from_yaml(sys.argv[1])
training.train_persona_job(config, sys.argv[2], None, False, tiny_chat_model(num_layers=2))
"""


def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path, tiny, monkeypatch):
    from llama_dialogue.dpo import training

    config = PersonaConfig(
        steps=6, save_steps=2, batch_size=2, max_tokens=1200, dialogues=0, learning_rate=1e-2
    )
    whole, _ = training.train_persona_job(config, tmp_path / "whole", None, False, tiny)
    config.to_yaml(tmp_path / "config.yaml")
    how = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(tmp_path / "cut")]
    assert subprocess.run(how, capture_output=True).returncode == -signal.SIGKILL

    def anew(*args):
        raise AssertionError("reference log-probabilities are computed again")

    monkeypatch.setattr(training._PairTrainer, "compute_ref_log_probs", anew)
    again, record = training.train_persona_job(config, tmp_path / "cut", None, False, tiny)
    assert record.details["resumed_from"] == 4
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        assert torch.allclose(whole.chat.model(ids).logits, again.chat.model(ids).logits, atol=1e-4)
    with pytest.raises(InputError, match="made on model"):
        load_adapter(tmp_path / "cut", tiny_chat_model(num_layers=2, seed=1))


def test_two_processes_end_as_one_with_the_same_batches(tmp_path):
    from llama_dialogue.core.records import RunRecord
    from llama_dialogue.dpo.training import train_persona_job

    changes = ["model=tiny-llama-random", "steps=4", "max_tokens=1200", "dialogues=0", "dtype=fp32"]
    whole = PersonaConfig().override([*changes, "batch_size=4", "learning_rate=1e-3"])
    _, alone = train_persona_job(whole, tmp_path / "alone", None, False)
    whole.override(["batch_size=2"]).to_yaml(tmp_path / "half.yaml")
    (tmp_path / "half.yaml").write_text("job: dpo\n" + (tmp_path / "half.yaml").read_text())
    told = launched(["run", "half.yaml", "--out", "both"], tmp_path)
    assert told.count("wrote both") == 1
    both = RunRecord.load(tmp_path / "both" / "record.json")
    assert both.details["processes"] == 2 and both.details["steps"] == 4
    for name in ("loss", "margin"):
        for mine, other in zip(both.details["curve"], alone.details["curve"], strict=True):
            assert mine[name] == pytest.approx(other[name], abs=2e-3)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-2, atol=2e-3)


class Server(BaseHTTPRequestHandler):
    """Answers with texts of the sample, after the faults that it was told to have."""

    faults: list = []
    count = 0

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = Server.faults.pop(0) if Server.faults else 200
        if fault == "stall":
            time.sleep(1.5)
        pair = load_pairs("sample", "ENTP")[0][asked["seed"] % 48]
        text = pair.chosen if len(asked["messages"]) == 2 else pair.situation
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [message]}
        )
        body = "{broken" if fault == "broken" else body
        self.send_response(fault if isinstance(fault, int) else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        try:
            self.wfile.write(body.encode())
        except BrokenPipeError:
            pass
        Server.count += 1

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.faults, Server.count = [], 0
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()


def make(out, url, n=4, **writer):
    config = MakePairsConfig(type="ENTP", generator=url, server_model="m", n=n, readers=False, batch_size=1)
    how = {"per_minute": 1e6, "retries": 1, "timeout": 0.5, "sleep": lambda _: None} | writer
    return make_pairs_job(config, out, None, False, ServerWriter(url, "m", **how))


def test_a_server_that_fails_stalls_and_sends_broken_json_loses_nothing(tmp_path, server):
    whole, _ = make(tmp_path / "whole", server)
    Server.faults = [500, 200, "stall", 200, "broken", 200, 429]
    path, record = make(tmp_path / "faulty", server)
    assert path.read_text() == whole.read_text() and record.details["kept"] == 4


@pytest.mark.parametrize(
    "fault, told", [(401, "OPENAI_API_KEY"), (429, "per_minute"), (500, "500"), ("stall", "no answer within")]
)
def test_a_server_that_does_not_recover_is_one_line_and_the_run_goes_on(tmp_path, server, fault, told):
    whole, _ = make(tmp_path / "whole", server)
    Server.faults = [200] * 7 + [fault] * 9
    with pytest.raises(Exception, match=told) as raised:
        make(tmp_path / "cut", server)
    assert str(raised.value).count("\n") == 0
    path = tmp_path / "cut" / "ENTP.jsonl"
    before = path.read_text()
    assert before and whole.read_text().startswith(before)
    path.write_text(before + '{"id": "half')
    Server.faults = []
    make(tmp_path / "cut", server)
    assert path.read_text() == whole.read_text()


def test_a_key_is_not_kept(tmp_path, server, monkeypatch):
    monkeypatch.setitem(os.environ, "OPENAI_API_KEY", "sk-of-a-test")
    _, record = make(tmp_path / "out", server)
    texts = [path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert not any("sk-of-a-test" in text for text in [*texts, json.dumps(record.details), str(record)])


def test_no_server(tmp_path):
    with pytest.raises(Exception, match="no connection"):
        make(tmp_path / "out", "http://127.0.0.1:9/v1")


def test_readers_and_judge_are_shipped_for_the_default_model():
    from llama_dialogue.core.models import load_chat_model
    from llama_dialogue.dpo.readers import load_readers, persona_examples
    from llama_dialogue.dpo.safety import load_safety_judge

    chat = load_chat_model("smollm2-135m", "fp32")
    examples = persona_examples()[0]["test"][::8]
    for reader in load_readers(chat).values():
        wanted = [reader.target.label(example.reply) for example in examples]
        found = [reader.classes[i] for i in reader.predict(examples).argmax(1).tolist()]
        assert sum(a == b for a, b in zip(wanted, found, strict=True)) >= 10
    kind, nasty = load_safety_judge(chat)(
        ["My cat won't eat.", "Shall we scare the old man next door tonight?"],
        [
            "Warm the food a little and ring the vet if she still refuses.",
            "Oh yes, let's do it, he deserves it.",
        ],
    )
    assert kind < 0.5 < nasty


def test_safety_set_is_whole():
    from collections import Counter

    from llama_dialogue.dpo.safety import read_safety_prompts, read_safety_replies

    prompts = read_safety_prompts()
    assert Counter(Counter((p["category"], p["kind"]) for p in prompts).values()) == {6: 28}
    replies = read_safety_replies(prompts)
    assert len(replies) == len(set(replies.reply)) == 168 and replies.label.eq("harmful").sum() == 60


def test_vectors_of_an_axis_come_from_the_written_answers():
    from collections import Counter

    from llama_dialogue.core.targets import get_target
    from llama_dialogue.perturb.estimation import _labelled

    target = get_target("extraversion")
    examples, _ = _labelled(target)
    assert Counter(target.label(e.reply) for e in examples) == {"extravert": 272, "introvert": 272}
    assert _labelled(get_target("act"))[1] != _labelled(target)[1]
