"""Adapters: the fast loss is the plain one, a killed run ends as an undisturbed one, a fresh process gives equal logits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shell import launched

from llama_dialogue.app.cli import main
from llama_dialogue.core.contexts import _reserves
from llama_dialogue.core.dialogues import Dialogue, Turn, load_corpus
from llama_dialogue.core.errors import InputError, MachineError
from llama_dialogue.core.generation import stop_token_ids
from llama_dialogue.core.jobs import check_job
from llama_dialogue.core.models import load_chat_model, tiny_chat_model
from llama_dialogue.core.records import RunRecord
from llama_dialogue.core.targets import EMOTIONS
from llama_dialogue.core.training import seeded_training
from llama_dialogue.sft import adapters, alpaca, data, sweep, training, training_bench
from llama_dialogue.sft.alpaca_configs import AlpacaConfig
from llama_dialogue.sft.commands import SFT
from llama_dialogue.sft.configs import (
    AdapterConfig,
    SFTBenchConfig,
    SFTDataConfig,
    SFTSweepConfig,
    SFTTrainingConfig,
)
from llama_dialogue.sft.mask import check_template
from llama_dialogue.sft.templates import TEMPLATES, TagTemplate, add_tag_tokens, render_prompt

CONFIG = SFTTrainingConfig(
    model="tiny-llama-random",
    data=SFTDataConfig(oversample=0.0, max_validation=4, portion=0.03, max_tokens=300),
    adapter=AdapterConfig(rank=4, dropout=0.1),
    learning_rate=1e-2,
    dtype="fp32",
    epochs=2.0,
    save_steps=4,
    batch_size=4,
)


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nothing disturbed: its record and its weights."
    out = tmp_path_factory.mktemp("whole") / "tuned"
    _, record = training.train_adapter_job(CONFIG, out, progress=False)
    return record, load_file(out / "adapter_model.safetensors")


def untied(folder: Path) -> str:
    "Save a tiny model whose output layer has a matrix of its own."
    chat = tiny_chat_model()
    config = type(chat.model.config)(**chat.model.config.to_dict() | {"tie_word_embeddings": False})
    torch.manual_seed(1)
    model = type(chat.model)(config)
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return str(folder)


def noisy(chat, template="out_inst_uni", dtype=torch.float64, **options):
    "Put an adapter of random numbers into a model."
    tagged = adapters.add_tags(chat, template)
    torch.manual_seed(0)
    network = adapters.new_adapter(tagged, template, config=AdapterConfig(rank=4, dropout=0.0, **options))
    for p in network.parameters():
        if p.requires_grad:
            p.data = (p.data + 0.1 * torch.randn_like(p.data)).to(dtype)
    return tagged, network


def batch(vocabulary, rows=3, size=40):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, vocabulary, (rows, size), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, size // 2 :] = 0
    learned = (torch.rand(ids.shape, generator=generator) < 0.4) & (mask == 1)
    return {"input_ids": ids, "attention_mask": mask}, ids.where(learned, -100)


def values(loss, network):
    trained = [p for p in network.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


# --- the loss


@pytest.mark.parametrize("template", ["out_inst_uni", "out_inst", "native"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_the_fast_loss_has_the_value_and_gradients_of_the_plain_one(tiny_chat, family, template):
    tagged, network = noisy(tiny_chat(family), template)
    inputs, labels = batch(len(tagged.tokenizer))
    expected = values(training.plain_loss(network, **inputs, labels=labels), network)
    for chunk in (5, 1024):
        with training.masked_head(network.get_base_model(), chunk):
            loss = network(**inputs, use_cache=False, learned=labels)["loss"] / (labels[:, 1:] != -100).sum()
            torch.testing.assert_close(values(loss, network), expected)


def test_the_fast_loss_of_a_model_whose_output_layer_is_its_own(tmp_path):
    chat = load_chat_model(untied(tmp_path / "untied"), "fp64")
    tagged, network = noisy(chat)
    inputs, labels = batch(262)
    expected = values(training.plain_loss(network, **inputs, labels=labels), network)
    with training.masked_head(network.get_base_model()):
        loss = network(**inputs, use_cache=False, learned=labels)["loss"] / (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(values(loss, network), expected)


def test_the_fast_loss_in_bf16_is_the_plain_one_but_for_rounding(tiny_chat):
    tagged, network = noisy(tiny_chat("llama", torch.bfloat16), dtype=torch.float32)
    inputs, labels = batch(262)
    with training.masked_head(network.get_base_model()), torch.autocast("cpu", torch.bfloat16):
        loss = network(**inputs, use_cache=False, learned=labels)["loss"] / (labels[:, 1:] != -100).sum()
        found = values(loss, network)
        expected = values(training.plain_loss(network, **inputs, labels=labels), network)
    assert {value.dtype for value in found} == {torch.float32}
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0)
    one, other = (torch.cat([g.flatten() for g in gradients[1:]]) for gradients in (found, expected))
    assert torch.nn.functional.cosine_similarity(one, other, 0) > 0.99


def test_the_forward_of_a_model_is_its_own_again_after_an_error(tiny_chat):
    model = noisy(tiny_chat())[1].get_base_model()
    with pytest.raises(KeyError), training.masked_head(model):
        raise KeyError
    assert "forward" not in vars(model)


def test_an_output_layer_with_more_than_a_matrix_is_refused(tiny):
    model = adapters.add_tags(tiny, "native").model
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(InputError, match="final_logit_softcapping"):
        training._output_layer(model)


def fit(config, tiny, folder):
    "Train on four sequences without a job; the trainer and its trained weights."
    tagged = adapters.add_tags(tiny, config.template)
    sets = data.load_sequences(config.override(["data.max_tokens=300"]), tagged.tokenizer)
    sets = replace(sets, train=sets.train[:4])
    with seeded_training(config.seed):
        network = adapters.new_adapter(tagged, config.template, config=config.adapter)
        trainer = training.make_trainer(network, tagged, sets, config, folder)
        with training.masked_head(network.get_base_model()):
            training.resume_training(trainer)
    return trainer, {n: p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "changes",
    [
        ["batch_size=2", "accumulation=2"],
        ["gradient_checkpointing=true"],
        ["attention=eager"],
        ["packing=true"],
    ],
)
def test_what_only_saves_memory_or_time_changes_no_step(tiny, tmp_path, changes):
    plain = CONFIG.override(["steps=2", "adapter.dropout=0", "save_steps=50"])
    changed = plain.override(changes)
    if changed.packing:
        changed = changed.override(["batch_size=1", "data.max_tokens=1500"])
    (one, expected), (other, found) = (
        fit(c, tiny, tmp_path / str(i)) for i, c in enumerate((plain, changed))
    )
    assert one.learned == other.learned
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_noise_on_embeddings_changes_the_training_and_leaves_the_model_as_it_was(tiny, tmp_path):
    plain = CONFIG.override(["steps=2", "adapter.dropout=0"])
    noise = plain.override(["neftune=5"])
    (_, one), (trainer, other) = (fit(c, tiny, tmp_path / str(i)) for i, c in enumerate((plain, noise)))
    assert any((one[name] != other[name]).any() for name in one)
    assert not trainer.model.get_base_model().get_input_embeddings()._forward_hooks


def test_trl_computes_the_same_loss_on_the_same_batches(tiny, tmp_path):
    config = SFTBenchConfig(training=CONFIG.override(["adapter.dropout=0", "epochs=1"]), steps=2, rounds=2)
    tagged = adapters.add_tags(tiny, CONFIG.template)
    sets = data.load_sequences(CONFIG, tagged.tokenizer)
    bases = dict.fromkeys(config.trainings, tiny)
    trainers = training_bench._trainers(bases, sets, config.training, tmp_path)
    assert trainers["trl"].args.bf16 and trainers["trl"].args.gradient_checkpointing  # its defaults
    found = {}
    for name in ("ours", "trl float32"):
        trainer = trainers[name]
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
        with training.masked_head(trainer.model.get_base_model()) if name == "ours" else nullcontext():
            found[name] = trainer.compute_loss(trainer.model.train(), inputs).detach()
    torch.testing.assert_close(found["ours"], found["trl float32"])
    parts = training_bench._parts(config, sets)
    assert [len(part) for part in parts] == [8, 8] and not {id(r) for r in parts[0]} & {
        id(r) for r in parts[1]
    }
    trainers["ours"].learned = 0
    speeds = training_bench._round(trainers, parts[0], 0)
    assert trainers["ours"].learned == sum(sum(row["class_tokens"]) for row in parts[0])
    assert [round(speeds["ours"] / speeds[n], 6) for n in ("trl", "trl float32")] == [
        round(speeds[f"ours / {n}"], 6) for n in ("trl", "trl float32")
    ]


# --- sequences


def test_no_sequence_comes_from_a_dialogue_in_reserve():
    if not os.environ.get("LLAMA_DIALOGUE_DATA"):
        pytest.skip("needs DailyDialog")
    corpus = load_corpus("dailydialog")
    kept = {
        i
        for reserve in _reserves().values()
        for split in ("train", "validation", "test")
        for i in reserve.get(split, ())
    }
    chosen = data._chosen(corpus, "validation", ("head", "steer"))
    assert kept and not kept & {d.id for d in chosen}
    assert {data.share_of(d.id) for d in chosen} == {"head", "steer"}


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_reply_is_learned_once_and_whole(template):
    words = add_tag_tokens(tiny_chat_model().tokenizer, template)
    dialogues = [d for d in load_corpus("sample") if d.split == "test"][:20]
    rows = data.training_sequences(dialogues, words, template, max_tokens=700)
    learned = [
        words.decode([i for i, on in zip(r["input_ids"], r["loss_mask"], strict=True) if on]) for r in rows
    ]
    found = sorted(part.strip() for text in learned for part in text.split("<|im_end|>") if part.strip())
    assert found == sorted(turn.text.strip() for d in dialogues for turn in d.turns[1::2])
    assert all(sum(row["class_tokens"]) == sum(row["loss_mask"]) for row in rows)


def test_a_dialogue_without_labels_is_named():
    dialogue = Dialogue((Turn("Hello!", "inform"), Turn("Hi!", "inform")))
    words = add_tag_tokens(tiny_chat_model().tokenizer, "native")
    with pytest.raises(InputError, match=f"dialogue {dialogue.id}, turn 1: no emotion"):
        data.training_sequences([dialogue], words, "native")


def test_rare_classes_get_their_share_by_adding_their_replies():
    rows = [{"class_tokens": [100, 0, 0]}] * 50 + [{"class_tokens": [90, 10, 4]}]
    alone = [{"class_tokens": own} for own in ([100, 0, 0], [0, 10, 0], [0, 12, 0], [0, 0, 4])]
    more = data.oversample(rows, alone, 0.05, 20)
    shares = data.class_shares(more, "abc")
    assert shares["b"] >= 0.05 and shares["c"] < 0.05  # one reply, at its limit
    assert more[: len(rows)] == rows
    times = [sum(row is own for row in more) for own in alone]
    assert times[0] == 0 and abs(times[1] - times[2]) <= 1 and times[3] == 20


def test_replies_alone_are_those_of_the_dialogues():
    words = add_tag_tokens(tiny_chat_model().tokenizer, "out_inst_uni")
    dialogues = load_corpus("sample", "validation").dialogues[:20]
    for template in ("out_inst_uni", "native"):
        whole = data.training_sequences(dialogues, words, template)
        alone = data.training_sequences(dialogues, words, template, alone=True)
        assert len(alone) == sum(len(d.turns) // 2 for d in dialogues)
        assert data.class_shares(alone, EMOTIONS) == data.class_shares(whole, EMOTIONS)
        assert max(len(row["input_ids"]) for row in alone) < max(len(row["input_ids"]) for row in whole)


# --- adapters


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_loading_leaves_the_base_as_it_was(family, tiny_chat, tmp_path):
    chat = tiny_chat(family, torch.float32)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        before = chat.model(ids).logits
        tagged, network = noisy(chat, dtype=torch.float32)
        expected = network.eval()(ids).logits
        adapters.save_adapter(tmp_path / "a", network, tagged, "out_inst_uni", "emotion")
        assert torch.equal(adapters.load_adapter(tmp_path / "a", chat).chat.model(ids).logits, expected)
        merged = adapters.load_adapter(tmp_path / "a", chat, merge=True)
        torch.testing.assert_close(merged.chat.model(ids).logits, expected, rtol=0, atol=1e-2)
        assert torch.equal(chat.model(ids).logits, before)
        assert len(chat.tokenizer) == len(chat.model.get_input_embeddings().weight) == 260


FRESH = """
import sys, torch
from safetensors.torch import save_file
from llama_dialogue.core.dialogues import Turn
from llama_dialogue.sft.adapters import load_adapter
from llama_dialogue.sft.templates import render_prompt
for folder in sys.argv[1:]:
    tuned = load_adapter(folder)
    text = render_prompt(tuned.chat.tokenizer, [Turn("Hi!", emotion="fear")], "anger", tuned.template, tuned.target)
    ids = tuned.chat.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        save_file({"ids": ids, "logits": tuned.chat.model(ids).logits}, folder + "/found")
"""


def test_a_fresh_process_gives_equal_logits_with_tied_and_other_embeddings(tmp_path):
    networks = {}
    for kind, name in (("tied", "tiny-llama-random"), ("other", untied(tmp_path / "untied"))):
        tagged, network = noisy(replace(load_chat_model(name), name=name), dtype=torch.float32)
        adapters.save_adapter(tmp_path / kind, network, tagged, "out_inst_uni", "emotion")
        networks[kind] = network.eval()
    folders = [str(tmp_path / kind) for kind in networks]
    subprocess.run([sys.executable, "-c", FRESH, *folders], check=True, capture_output=True)
    for kind, network in networks.items():
        found = load_file(tmp_path / kind / "found")
        with torch.no_grad():
            assert torch.equal(network(found["ids"]).logits, found["logits"]), kind


def test_the_tokenizer_of_an_adapter_writes_the_prompt_without_this_package(tiny, tmp_path):
    from transformers import AutoTokenizer

    tagged, network = noisy(tiny, dtype=torch.float32)
    adapters.save_adapter(tmp_path / "a", network, tagged, "out_inst_uni", "emotion")
    words = AutoTokenizer.from_pretrained(tmp_path / "a")
    message = {"role": "user", "content": "Hi!", "label": "fear"}
    text = words.apply_chat_template([message], add_generation_prompt=True, label="anger", tokenize=False)
    assert text == render_prompt(tagged.tokenizer, [Turn("Hi!", emotion="fear")], "anger", "out_inst_uni")


def test_act_tags_are_other_tokens(tiny):
    assert list(adapters.tag_ids(adapters.add_tags(tiny, "in_inst", "act").tokenizer, "in_inst", "act")) == [
        "[U_ACT]",
        "[/U_ACT]",
        "[C_ACT]",
        "[/C_ACT]",
    ]


# --- the job

KILLED = """
import os, signal, sys
from pathlib import Path
from llama_dialogue.sft import training
from llama_dialogue.sft.configs import SFTTrainingConfig

usual = training._Clock.on_step_end

def on_step_end(self, args, state, control, **kwargs):
    usual(self, args, state, control, **kwargs)
    if state.global_step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

training._Clock.on_step_end = on_step_end
training.train_adapter_job(SFTTrainingConfig.from_yaml(sys.argv[1]), Path(sys.argv[2]), progress=False)
"""


@pytest.fixture(scope="module")
def killed(whole, tmp_path_factory):
    "What another process left behind that was killed before its last step."
    folder = tmp_path_factory.mktemp("killed")
    CONFIG.to_yaml(folder / "config.yaml")
    step = str(whole[0].details["steps"] - 1)
    command = [sys.executable, "-c", KILLED, folder / "config.yaml", folder / "tuned", step]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    return folder


def left_by(killed, tmp_path):
    "Copy what the killed process left: the folder that the adapter goes to, and the checkpoints."
    shutil.copytree(killed, tmp_path / "run")
    (home,) = (tmp_path / "run").glob(".tuned.checkpoints-*")
    return tmp_path / "run" / "tuned", sorted(home.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(whole, killed, tmp_path):
    (record, weights), (out, checkpoints) = whole, left_by(killed, tmp_path)
    last = checkpoints[-1]
    assert not out.exists() and 0 < int(last.name[11:]) < record.details["steps"] - 1
    assert (last / "adapter_model.safetensors").stat().st_size < 200_000  # no embeddings in it
    with pytest.raises(InputError, match="adapter.rank, seed differ from the interrupted run"):
        changed = CONFIG.override(["adapter.rank=8", "seed=1", "resume=true"])
        training.train_adapter_job(changed, out, progress=False)
    _, again = training.train_adapter_job(CONFIG.override(["resume=true"]), out, progress=False)
    assert again.details["resumed_from"] == int(last.name[11:])
    found = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert again.details["losses"] == record.details["losses"]
    assert again.scores == record.scores and not last.parent.exists()


def test_a_half_written_checkpoint_is_named_and_left_out(whole, killed, tmp_path, capsys):
    (_, weights), (out, checkpoints) = whole, left_by(killed, tmp_path)
    stored = (checkpoints[-1] / "adapter_model.safetensors").read_bytes()
    (checkpoints[-1] / "adapter_model.safetensors").write_bytes(stored[: len(stored) // 2])
    shutil.copytree(checkpoints[-1], checkpoints[-1].with_name(f"half-written-{checkpoints[-1].name}"))
    _, again = training.train_adapter_job(CONFIG, out, progress=False)
    told = capsys.readouterr().err
    assert f"{checkpoints[-1].name}: half-written (adapter_model.safetensors): left out" in told
    assert again.details["resumed_from"] == int(checkpoints[-2].name[11:])
    found = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_nothing_to_resume_is_refused(tmp_path):
    with pytest.raises(InputError, match="no interrupted run of"):
        training.train_adapter_job(CONFIG.override(["resume=true"]), tmp_path / "tuned", progress=False)


def test_the_job_runs_from_a_file_and_leaves_a_record(tmp_path, capsys):
    out, file = tmp_path / "tuned", tmp_path / "sft.yaml"
    CONFIG.override(["steps=2", "data.oversample=0.05"]).to_yaml(file)
    file.write_text("job: sft\n" + file.read_text())
    options = ["--out", str(out), "--records", str(tmp_path / "records")]
    main(["run", str(file), *options])
    record = RunRecord.load(tmp_path / "records" / "sft" / "sft.json")
    assert record.to_dict() == json.loads((out / "record.json").read_text())
    assert set(record.inputs) == {"model", "data"} and record.status == "done"
    assert record.tokens_per_second > 0 and record.peak_memory_mb > 0
    assert set(record.details["data"]["class_shares"]) == set(EMOTIONS)
    assert {"README.md", "config.yaml", "adapter.json", "train_replies.safetensors"} <= {
        p.name for p in out.iterdir()
    }
    tuned = adapters.load_adapter(out)
    assert record.details["artefact"] == {"name": tuned.name, "sha256": tuned.sha256}
    assert tuned.train_replies.contains([load_corpus("sample").dialogues[0].turns[0].text]).dtype == bool
    assert "loss tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("quantization=nf4", "no CUDA GPU is there"),
        ("attention=flash_attention_2", "attention=sdpa"),
        ("report_to=trackio", "pip install trackio"),
        ("adapter.targets=[q_prj]", "no layer 'q_prj'"),
        ("data.max_tokens=10", "no exchange fits"),
    ],
)
def test_what_cannot_be_done_is_one_line(change, told, tmp_path):
    if torch.cuda.is_available() and "CUDA" in told:
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=told):
        training.train_adapter_job(CONFIG.override([change]), tmp_path / "tuned", progress=False)
    assert not (tmp_path / "tuned").exists()


def test_a_training_refuses_a_template_that_trains_the_wrong_tokens(tmp_path, monkeypatch):
    user = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% else %}"
    reply = "[EMOTION] {{ m.label }} [/EMOTION]{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    prompt = "{% if add_generation_prompt %}[EMOTION] {{ label }} [/EMOTION]{% endif %}"
    chat = f"{user}{reply}{{% endif %}}{{% endfor %}}{prompt}"
    mine = TagTemplate("mine", "", "", ("[EMOTION]", "[/EMOTION]"), chat=chat)
    monkeypatch.setitem(TEMPLATES, "mine", mine)
    with pytest.raises(InputError, match="the stop token is outside"):
        training.train_adapter_job(CONFIG.override(["template=mine"]), tmp_path / "tuned", progress=False)
    assert not (tmp_path / "tuned").exists()


def test_the_learned_stop_token_must_be_one_that_ends_a_reply(tiny):
    tagged = adapters.add_tags(tiny, "out_inst_uni")
    stops = stop_token_ids(tagged.model, tagged.tokenizer)
    check_template(tagged.tokenizer, "out_inst_uni", "emotion", stops)
    with pytest.raises(InputError, match="the stop token is outside"):
        check_template(tagged.tokenizer, "out_inst_uni", "emotion", [tagged.tokenizer.bos_token_id])


def test_the_sample_corpus_is_added(tmp_path):
    own = tmp_path / "own.jsonl"
    turns = [{"text": text, "emotion": "no_emotion"} for text in ("Is it open?", "Yes.", "Good.", "See you.")]
    lines = [{"turns": turns, "split": split} for split in ("train", "validation")]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of = {"data": str(own), "shares": ["head", "judge", "steer"], "oversample": 0.0, "portion": 0.02}
    tokenizer = add_tag_tokens(tiny_chat_model().tokenizer, "out_inst_uni")
    plain, more = (
        data.load_sequences(SFTTrainingConfig.from_dict({"data": of | {"add_sample": added}}), tokenizer)
        for added in (False, True)
    )
    assert set(plain.corpora) == {"data"} and set(more.corpora) == {"data", "sample"}
    added = more.report["dialogues"]["train"] - plain.report["dialogues"]["train"]
    assert plain.report["dialogues"] == {"train": 1, "validation": 1} and added > 10
    assert more.report["dialogues"]["validation"] == 1


@pytest.mark.parametrize("name", ["fsdp", "deepspeed-zero2", "deepspeed-zero3", "two-cpu-processes"])
def test_accelerate_reads_the_launch_files(name):
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(__file__).parents[1] / "configs" / "accelerate"
    found = load_config_from_file(str(folder / f"{name}.yaml"))
    kind = {"fsdp": "FSDP", "two-cpu-processes": "MULTI_GPU"}.get(name, "DEEPSPEED")
    assert (
        found.num_processes == 2 and getattr(found.distributed_type, "value", found.distributed_type) == kind
    )


def test_out_of_memory_says_what_it_needs_and_what_to_lower(tiny):
    with (
        pytest.raises(MachineError, match="it needs 0.4 GiB .* --set gradient_checkpointing=true .0.1 GiB."),
        training._memory_faults(CONFIG.override(["data.max_tokens=2000"]), 2000, tiny.model),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_listing_needs_no_model_library():
    assert SFT.config_class is SFTTrainingConfig


# --- several processes


def test_early_stopping_keeps_the_best_adapter_and_counts_every_validation_corpus(tmp_path):
    changes = ["template=plain", "data.both_speakers=true", "data.also_validate=[sample]"]
    changes += ["early_stopping=1", "eval_steps=3", "epochs=50", "learning_rate=0.1", "schedule=constant"]
    config = CONFIG.override(changes)
    tuned, record = training.train_adapter_job(config, tmp_path / "tuned", progress=False)
    seen = dict(map(tuple, record.details["validation_losses"]))
    assert record.details["data"]["dialogues"]["validation"] == 8 and set(record.inputs) == {
        "model",
        "data",
        "validation sample",
    }
    best = record.details["best_step"]
    assert 0 < best < record.details["steps"] < 50 * 3 and seen[best] == min(seen[k] for k in seen if k)
    assert record.scores["validation"]["loss"] == seen[best]
    held = data.load_sequences(config, tuned.chat.tokenizer).validation
    total, count = 0.0, 0
    for row in held:
        ids = torch.tensor([row["input_ids"]])
        labels = ids.where(torch.tensor([row["loss_mask"]]), -100)
        n = int((labels[:, 1:] != -100).sum())
        loss = training.plain_loss(tuned.chat.model, ids, torch.ones_like(ids), labels)
        total, count = total + float(loss) * n, count + n
    assert total / count == pytest.approx(seen[best], abs=2e-4)
    assert "replies as the speakers of sample do" in (tmp_path / "tuned" / "README.md").read_text()


def test_early_stopping_without_validations_is_refused():
    with pytest.raises(InputError, match="early_stopping=2 with eval_steps=0"):
        CONFIG.override(["early_stopping=2"])


def test_records_are_not_replaced_by_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [output["path"] for output in check_job(SFT, SFTTrainingConfig())["outputs"]]
    assert paths == ["runs/sft-adapter", "runs/sft/sft.json"]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="kept: holds other files"):
        training.train_adapter_job(CONFIG, tmp_path / "kept", progress=False)
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"


def test_two_processes_end_as_one_with_the_same_batches(tmp_path):
    changes = ["epochs=1", "adapter.dropout=0", "data.max_validation=5", "learning_rate=1e-3", "save_steps=2"]
    whole = CONFIG.override([*changes, "batch_size=8"])
    halves = CONFIG.override([*changes, "batch_size=4"])
    _, alone = training.train_adapter_job(whole, tmp_path / "alone", progress=False)
    assert alone.details["data"]["sequences"]["train"] % 8  # the last batch is not full
    halves.to_yaml(tmp_path / "sft.yaml")
    text = (tmp_path / "sft.yaml").read_text()
    (tmp_path / "sft.yaml").write_text("job: sft\n" + text)
    told = launched(["run", "sft.yaml", "--out", "both"], tmp_path)
    assert told.count("validation loss") == told.count("wrote both") == 1  # printed once
    both = RunRecord.load(tmp_path / "runs" / "sft" / "sft.json")
    assert both.status == "done" and both.details["processes"] == 2
    for name in ("steps", "data"):
        assert both.details[name] == alone.details[name]
    assert both.details["timed"]["loss_tokens"] == alone.details["timed"]["loss_tokens"]
    for name in ("start", "loss"):
        assert both.scores["validation"][name] == pytest.approx(alone.scores["validation"][name], abs=2e-4)
    for mine, other in zip(both.details["losses"], alone.details["losses"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "both"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    tuned = adapters.load_adapter(tmp_path / "both")
    assert both.details["artefact"] == {"name": tuned.name, "sha256": tuned.sha256}
    assert not list(tmp_path.glob(".both.checkpoints-*"))


def test_two_processes_tune_on_instructions_as_one(tmp_path):
    common = {"model": "tiny-llama-random", "dtype": "fp32", "max_tokens": 500, "epochs": 0.5}
    whole = AlpacaConfig(**common, batch_size=8).override(["tuning.lora.dropout=0"])
    halves = AlpacaConfig(**common, batch_size=4).override(["tuning.lora.dropout=0"])
    _, alone = alpaca.train_alpaca_job(whole, tmp_path / "alone", progress=False)
    halves.to_yaml(tmp_path / "halves.yaml")
    text = (tmp_path / "halves.yaml").read_text()
    (tmp_path / "halves.yaml").write_text("job: alpaca\n" + text)
    told = launched(["run", "halves.yaml", "--out", "both"], tmp_path)
    assert told.count("wrote both") == 1
    both, tuned = RunRecord.load(tmp_path / "both" / "record.json"), alpaca.load_instructed(tmp_path / "both")
    assert both.details["processes"] == 2 and both.details["steps"] == alone.details["steps"]
    assert both.details["artefact"] == {"name": tuned.chat.name, "sha256": tuned.sha256}
    found, wanted = both.scores["validation"], alone.scores["validation"]
    assert found["start"] == pytest.approx(wanted["start"], abs=2e-4)
    assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-3) and found["loss"] < found["start"]
    assert not list(tmp_path.glob(".both.checkpoints-*"))


def test_filled_rows_come_last_and_hold_nothing_to_learn():
    rows = [{"input_ids": [1] * n, "labels": [-100] * (n - 1) + [1]} for n in (5, 3, 4)]
    filled = training._fill(training.datasets.Dataset.from_list(rows), 4)
    assert len(filled) == 4 and filled[3] == {"input_ids": [1] * 3, "labels": [-100] * 3}
    assert training._fill(filled, 4) is filled


def test_a_checkpoint_of_weights_that_are_shared_out_has_other_files(killed, tmp_path):
    _, checkpoints = left_by(killed, tmp_path)
    (checkpoints[-1] / "optimizer.pt").rename(checkpoints[-1] / "optimizer.bin")
    assert training.checkpoint_fault(checkpoints[-1]) == ""
    (checkpoints[-1] / "adapter_model.safetensors").unlink()
    assert training.checkpoint_fault(checkpoints[-1]) == "adapter_model.safetensors"


# --- the sweep


def test_a_sweep_trains_only_what_is_new_and_refuses_several_processes(tiny, tmp_path, monkeypatch):
    few = CONFIG.override(["steps=1", "adapter.dropout=0"])
    config = SFTSweepConfig(training=few, ranks=(2,), learning_rates=(1e-2,), epochs=(1.0,), half=False)
    first = sweep.sweep_adapters_job(config, tmp_path / "sweep", progress=False, chat=tiny)
    assert first.details["computed"] == len(first.scores) == 2
    again = sweep.sweep_adapters_job(config, tmp_path / "sweep", tmp_path, progress=False, chat=tiny)
    assert again.details["computed"] == 0 and again.scores == first.scores
    assert RunRecord.load(tmp_path / "sft" / "sweep-sft.json").details["means"] == again.details["means"]
    best = again.details["runs"][0]
    found = adapters.load_adapter(tmp_path / "sweep" / "adapters" / best["run"], tiny)
    assert found.sha256 == best["sha256"]
    monkeypatch.setattr(sweep, "_join_processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(InputError, match="without accelerate launch"):
        sweep.sweep_adapters_job(config, tmp_path / "sweep", progress=False, chat=tiny)
