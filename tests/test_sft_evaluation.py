"""Evaluations of tuned models: what is scored, what a second run computes, what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import make_judge

from llama_dialogue.app.cli import cli
from llama_dialogue.compare.cells import GridConfig, expand_cells
from llama_dialogue.compare.grid import run_grid
from llama_dialogue.compare.methods import SteeringConfig, SteeringInputs, steer
from llama_dialogue.compare.report import compare_cells
from llama_dialogue.compare.scored import read_scores
from llama_dialogue.compare.scores import score_grid
from llama_dialogue.core import contexts
from llama_dialogue.core.dialogues import Turn, load_corpus, make_examples, write_jsonl
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.grid import read_parts
from llama_dialogue.core.jobs import check_job
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.records import load_rows
from llama_dialogue.core.targets import EMOTION, EMOTIONS
from llama_dialogue.sft import evaluation, tag_likelihood
from llama_dialogue.sft.adapters import add_tags, load_adapter, new_adapter, save_adapter
from llama_dialogue.sft.commands import SFT_EVALUATION
from llama_dialogue.sft.evaluation import compare_models, evaluate_sft, evaluation_sets
from llama_dialogue.sft.evaluation_config import SFTEvaluationConfig
from llama_dialogue.sft.method import ADAPTER, Adapter
from llama_dialogue.sft.tag_likelihood import compare_hits, tag_likelihoods, tag_scores


def tune(chat, folder, template="out_inst_uni", target="emotion", seed=0):
    """Save an adapter that changes what its base writes."""
    torch.manual_seed(seed)
    tagged = add_tags(chat, template, target)
    network = new_adapter(tagged, template, target)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                weight.normal_(std=0.3)
    return str(save_adapter(folder, network, tagged, template, target))


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny):
    """A folder with two adapters, an adapter for acts, judges, and the base of another adapter."""
    folder = tmp_path_factory.mktemp("models")
    tune(tiny, folder / "outside")
    tune(tiny, folder / "inside", "in_inst", seed=1)
    tune(tiny, folder / "acts", "out_inst", "act")
    tune(tiny_chat_model(seed=1), folder / "foreign")
    make_judge(target="emotion").save_pretrained(folder / "judge")
    make_judge().save_pretrained(folder / "judge-act")
    return folder


@pytest.fixture(scope="module")
def config(place):
    values = {
        "models": ["tiny-llama-random", f"{place}/outside", f"{place}/inside"],
        "judge": f"{place}/judge",
        "dtype": "fp32",
        "reference": {"n": 8},
        "every": {"n": 2},
        "likelihood_n": 6,
        "least_replies": 2,
        "shard_size": 7,
        "decoding": {"max_new_tokens": 4},
    }
    return SFTEvaluationConfig.from_dict(values)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    record, rows = evaluate_sft(config, out / "parts", out / "records", progress=False)
    return record, rows, out


# the method


def test_a_tuned_model_replies_in_a_grid_and_its_report(place, tiny, tmp_path):
    grid = GridConfig.from_dict(
        {
            "name": "tuned",
            "model": "tiny-llama-random",
            "dtype": "fp32",
            "system": "none",
            "target": "emotion",
            "judge": f"{place}/judge",
            "contexts": {"n": 2},
            "decoding": {"max_new_tokens": 4},
            "cells": [
                {"method": "none"},
                {"method": "adapter", "inputs": {"adapter": [f"{place}/outside", f"{place}/inside"]}},
            ],
        }
    )
    run_grid(grid, tmp_path, progress=False)
    score_grid(tmp_path, progress=False)
    table = compare_cells(read_scores(tmp_path))
    labels = ["unsteered", "tuned adapter, adapter outside", "tuned adapter, adapter inside"]
    assert [name for name in table.index if name in labels] == labels
    rows = read_parts(tmp_path)
    assert (rows.forward_equivalents > 4).all(), "passes of the tuned model count"
    assert table.loc[labels].perplexity.map(float).gt(1).all()
    assert len({tuple(rows[rows.cell == name].reply) for name in labels}) == 3


def test_counting_passes_leaves_no_hook_behind(place, tiny):
    from llama_dialogue.core.generation import count_forward_equivalents

    adapter = Adapter(f"{place}/outside")
    with count_forward_equivalents(tiny.model):
        tuned = adapter.tuned(tiny)
    layers = [*tiny.model.get_decoder().layers, *tuned.chat.model.get_decoder().layers]
    assert not any(layer._forward_hooks for layer in layers)
    with count_forward_equivalents(tiny.model) as count, torch.no_grad():
        tuned.chat.model(torch.tensor([[5, 6, 7]]))
    assert count.forward_equivalents == pytest.approx(3)


def test_an_adapter_in_two_bases_of_one_sha_follows_its_base(place):
    adapter, first, second = Adapter(f"{place}/outside"), tiny_chat_model(), tiny_chat_model()
    assert adapter.tuned(first) is adapter.tuned(first)
    assert adapter.tuned(second) is not adapter.tuned(first)


def test_tags_that_a_model_writes_are_dropped(place, tiny, monkeypatch):
    from llama_dialogue.core import generation

    tuned = load_adapter(f"{place}/outside", tiny)
    tag = tuned.chat.tokenizer.convert_tokens_to_ids("[EMOTION]")

    def generate(model, tokenizer, prompts, *_, **__):
        ids = [tag, *tokenizer("Oh").input_ids, tag, tokenizer.eos_token_id]
        return generation.as_generations(model, tokenizer, [ids] * len(prompts))

    monkeypatch.setattr(generation, "generate", generate)
    inputs = SteeringInputs(adapter=Adapter(f"{place}/outside"))
    out = steer(ADAPTER, tiny, [(Turn("Well?"),)], ["anger"], inputs, SteeringConfig(), target="emotion")
    assert tag not in out.token_ids[0] and max(out.token_ids[0]) < 260 and out.stopped == [True]


def test_reply_takes_a_tuned_model(place, capsys):
    command = ["reply", "--model", "tiny-llama-random", "--method", "adapter", "--context", "Look there!"]
    command += ["--set", f"inputs.adapter={place}/outside", "--set", "decoding.max_new_tokens=3"]
    done = CliRunner().invoke(cli, [*command, "--emotion", "surprise", "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["class"] == "surprise"
    for wrong, told in (
        (["--emotion", "suprise"], "e.g. 'surprise'"),
        (["--act", "question"], "adapter for no_emotion"),
    ):
        failed = CliRunner().invoke(cli, [*command, *wrong])
        assert failed.exit_code == 2 and told in failed.output and len(failed.output.splitlines()) == 1


def test_a_cell_without_its_adapter_is_one_line(place):
    cells = [{"method": "adapter", "adapter": f"{place}/outside"}]
    grid = GridConfig(cells=tuple(cells), target="emotion", model="tiny-llama-random")
    assert expand_cells(grid)[0].method == "adapter"
    with pytest.raises(InputError, match="need a folder, e.g. --set inputs.adapter=runs/adapter"):
        run_grid(grid, place / "nothing", progress=False)


def test_a_folder_that_changed_is_refused(place, tiny, tmp_path):
    shutil.copytree(f"{place}/outside", tmp_path / "own")
    adapter = Adapter(str(tmp_path / "own"))
    about = json.loads((tmp_path / "own" / "adapter.json").read_text())
    (tmp_path / "own" / "adapter.json").write_text(json.dumps(about | {"system": "speaker"}))
    with pytest.raises(InputError, match="changed since the run began"):
        adapter.tuned(tiny)


# the likelihood of human replies


@pytest.mark.parametrize("template", ["in_inst", "out_inst", "in_inst_uni", "out_inst_uni", "native", "base"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_likelihoods_are_those_of_the_plain_way(template, family, tiny_chat, tmp_path):
    chat = tiny_chat(family)
    model = chat if template == "base" else load_adapter(tune(chat, tmp_path / "own", template), chat)
    examples = [e for e in make_examples(load_corpus()) if len(e.context) in (1, 3, 5)][5:9]
    plain = np.zeros((4, 7))
    for i, example in enumerate(examples):
        for c, label in enumerate(EMOTIONS):
            prompt, reply = tag_likelihood._under(model, example, label, EMOTION, "none")
            with torch.no_grad():
                logits = (
                    getattr(model, "chat", model).model(torch.tensor([prompt + reply])).logits[0].double()
                )
            scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            plain[i, c] = scores.gather(1, torch.tensor(reply)[:, None]).sum()
    for batch_tokens in (4096, 700, 1):
        assert np.abs(tag_likelihoods(model, examples, batch_tokens=batch_tokens) - plain).max() < 1e-6
    assert np.ptp(plain, axis=1).min() > 1e-6, "the tag makes a difference"


def test_the_true_tag_of_every_class_counts_alike():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [90, 10])
    hits = np.r_[np.ones(90), np.zeros(10)].astype(bool)
    given = np.where(np.eye(2)[np.where(hits, labels, 1 - labels)] > 0, -1.0, -2.0) - generator.random(
        (100, 1)
    )
    scores = tag_scores(given, labels, ["no_emotion", "fear"], least=20)
    assert (scores["true_likeliest"].value, scores["balanced"].value) == (0.9, 0.5)
    assert "true_likeliest_fear" not in scores, "ten replies are too few"


def test_a_difference_between_models_is_found_and_none_is_not():
    generator = np.random.default_rng(1)
    labels, ids = np.repeat(range(4), 50), np.arange(200) // 2
    weak, strong = (generator.random(200) < rate for rate in (0.2, 0.5))
    found = compare_hits(strong, weak, labels, ids)
    assert found["balanced_difference"].low > 0 and found["p"] < 0.01
    same = compare_hits(weak, generator.random(200) < 0.2, labels, ids)
    assert same["difference"].low < 0 < same["difference"].high and same["p"] > 0.05


# the evaluation


def test_every_model_is_asked_the_same(done, config):
    record, rows, _ = done
    keys = ["test", "dialogue_id", "place", "target_class", "seed"]
    asked = {model: set(own[keys].itertuples(index=False)) for model, own in rows.groupby("model")}
    assert asked["tiny-llama-random"] == asked["outside"] == asked["inside"]
    assert asked["human"] < asked["outside"]
    sets = evaluation_sets(config)
    every = rows[(rows.model == "outside") & (rows.test == "every")]
    assert {tuple(names) for names in every.groupby("dialogue_id").target_class.apply(list)} == {EMOTIONS}
    assert set(every.dialogue_id + "-" + every.place.astype(str)) == {e.dialogue_id for e in sets.every}


def test_the_record_holds_scores_and_no_text_of_the_corpus(done):
    record, rows, out = done
    assert list(record.scores) == ["tiny-llama-random", "outside", "inside", "human", "majority"]
    stored = load_rows(out / "records" / "sft" / "sft-evaluation.parquet")
    texts = {turn.text for dialogue in load_corpus() for turn in dialogue.turns}
    assert len(stored) == len(rows) and not texts & set(stored.reply.dropna())
    assert json.loads((out / "records/sft/sft-evaluation.json").read_text())["status"] == "done"
    human = record.scores["human"]
    assert human["reference_text"]["distinct_2"].value > 0.5, "texts are scored, though not stored"
    assert record.inputs["reader"]["sha256"] == record.inputs["model of outside"]["sha256"]
    assert set(record.inputs) >= {"judge", "data", "adapter outside", "adapter inside"}


def test_scores_are_those_of_the_rows(done):
    record, rows, _ = done
    for model in ("outside", "human"):
        own = rows[(rows.model == model) & (rows.test == "reference")]
        hits = own.judged == own.target_class
        assert record.scores[model]["reference"]["accuracy"].value == pytest.approx(hits.mean())
        weight = own.target_class.map(record.details["mix"]) / own.target_class.map(
            own.target_class.value_counts()
        )
        there = weight.sum()
        natural = record.scores[model]["natural"]["accuracy"].value
        assert natural == pytest.approx((hits * weight).sum() / there, abs=1e-3)
    every = rows[(rows.model == "inside") & (rows.test == "every")]
    assert record.scores["inside"]["every"]["accuracy"].value == pytest.approx(
        (every.judged == every.target_class).mean()
    )
    read = rows[(rows.model == "inside") & (rows.test == "likelihood")]
    likeliest = [EMOTIONS[np.argmax(row)] for row in read.log_likelihoods]
    assert record.scores["inside"]["likelihood"]["true_likeliest"].value == pytest.approx(
        np.mean(likeliest == read.target_class)
    )
    found = compare_models(rows, "outside", "tiny-llama-random", EMOTIONS)
    assert list(found) == ["reference", "every", "likelihood"]


def test_a_second_run_computes_only_the_model_that_is_new(done, config, place, tiny, monkeypatch):
    record, _, out = done
    computed = []
    work = evaluation._ModelWork.__call__
    monkeypatch.setattr(
        evaluation._ModelWork,
        "__call__",
        lambda self, item: (computed.append(self.label), work(self, item))[1],
    )
    again, _ = evaluate_sft(config, out / "parts", progress=False)
    assert not computed and again.to_dict()["scores"] == record.to_dict()["scores"]
    tune(tiny, place / "third", "out_inst", seed=2)
    more, _ = evaluate_sft(
        config.override([f"models=[tiny-llama-random, {place}/third]"]), out / "parts", progress=False
    )
    assert set(computed) == {"third"}
    base = record.to_dict()["scores"]["tiny-llama-random"]
    assert more.to_dict()["scores"]["tiny-llama-random"]["reference"] == base["reference"]


def test_what_was_there_before_a_kill_is_kept(config, tmp_path, monkeypatch):
    work, calls = evaluation._ModelWork.__call__, []

    def dies(self, item):
        calls.append(item.key)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return work(self, item)

    monkeypatch.setattr(evaluation._ModelWork, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_sft(config, tmp_path / "parts", tmp_path / "records", progress=False)
    assert json.loads((tmp_path / "records/sft/sft-evaluation.json").read_text())["status"] == "interrupted"
    first = calls[:3]
    evaluate_sft(config, tmp_path / "parts", tmp_path / "records", progress=False)
    assert not set(first) & set(calls[4:])


def test_base_models_are_compared_by_one_command(tmp_path, place):
    names = ["tiny-llama-random"]
    for number, family in enumerate(("mistral", "gemma")):
        chat = tiny_chat_model(family, seed=number)
        chat.model.save_pretrained(tmp_path / family)
        chat.tokenizer.save_pretrained(tmp_path / family)
        names.append(str(tmp_path / family))
    command = ["sft", "eval", "--models", ",".join(names), "--judge", f"{place}/judge"]
    command += ["--out", str(tmp_path / "out"), "--records", str(tmp_path / "records")]
    for value in ("dtype=fp32", "reference.n=2", "every.n=2", "likelihood_n=2", "decoding.max_new_tokens=3"):
        command += ["--set", value]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    rows = load_rows(tmp_path / "records/sft/sft-evaluation.parquet")
    assert set(rows.model) == {"tiny-llama-random", "mistral", "gemma", "human"}
    assert all(name in done.output for name in ("mistral", "gemma", "human", "majority", "reachable"))


def test_the_reserve_is_never_replied_to(tmp_path, monkeypatch):
    config = SFTEvaluationConfig.from_dict({"every": {"n": 5}})
    free = evaluation_sets(config)
    kept = sorted({e.id.partition("-")[0] for e in free.reference})[:20]
    reserve = {"own": {"data": "sample", "sha256": "", "test": kept}}
    monkeypatch.setattr(contexts, "_reserves", lambda: reserve)
    monkeypatch.setattr(evaluation, "_reserves", lambda: reserve)
    sets = evaluation_sets(config)
    assert not set(kept) & {e.dialogue_id.partition("-")[0] for e in (*sets.reference, *sets.every)}


def test_all_replies_with_a_feeling_are_taken_and_as_many_neutral_ones():
    sets = evaluation_sets(SFTEvaluationConfig())
    own = [e for e in make_examples([d for d in load_corpus() if d.split == "test"])]
    felt = {e.id for e in own if e.reply.emotion != "no_emotion"}
    chosen = [EMOTION.label(e.reply) for e in sets.reference]
    assert {e.dialogue_id for e in sets.reference if e.reply.emotion != "no_emotion"} == felt
    assert chosen.count("no_emotion") == len(felt)


def test_learned_replies_are_left_out_of_the_likelihoods(config, done, place, tiny, tmp_path):
    from llama_dialogue.core.fingerprints import Fingerprints

    sets = evaluation_sets(config)
    longest = max(sets.reference, key=lambda e: len(e.reply.text))
    tagged = add_tags(tiny, "out_inst_uni")
    learned = Fingerprints.of([longest.reply.text])
    folder = save_adapter(
        tmp_path / "own",
        new_adapter(tagged, "out_inst_uni"),
        tagged,
        "out_inst_uni",
        "emotion",
        "none",
        learned,
    )
    own = config.override([f"models=[{folder},{place}/outside]", "likelihood_n=0", "tests=[likelihood]"])
    record, rows = evaluate_sft(own, tmp_path / "parts", progress=False)
    assert list(record.details["compared"]) == ["outside - own"]
    assert len(rows) == 2 * len(sets.reference) - 2 and record.details["learned_replies_left_out"] == 1
    assert longest.dialogue_id not in set(rows.dialogue_id + "-" + rows.place.astype(str))
    kept, rows = evaluate_sft(
        own.override(["keep_train_duplicates=true"]), tmp_path / "parts", progress=False
    )
    assert len(rows) == 2 * len(sets.reference)


# what is refused


def test_what_cannot_be_evaluated_is_one_line(config, place, tmp_path):
    bare, half = tmp_path / "bare.jsonl", tmp_path / "half.jsonl"
    bare.write_text('{"turns": [{"text": "Hello."}, {"text": "Hi."}]}\n')
    talk = {"turns": [{"text": "Hello."}, {"text": "Hi!", "emotion": "happiness"}]}
    half.write_text(json.dumps(talk) + "\n")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    shutil.copytree(f"{place}/outside", tmp_path / "cut")
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"half")
    for values, told in (
        ([f"models=[{place}/acts]"], "was tuned for act, target='emotion'"),
        ([f"models=[{place}/outside]", "target=act"], "was tuned for emotion, target='act'"),
        ([f"models=[{place}/foreign]"], "need the same; make it for this one with llama-dialogue sft train"),
        ([f"judge={place}/judge-act"], "need one for emotion"),
        ([f"judge={place}/nothing"], "nothing"),
        ([f"data={bare}", "split=null"], "no reply with a label of emotion"),
        ([f"data={half}", "split=null", "tests=[reference]"], "turn 1: no emotion"),
        ([f"models=[{tmp_path}/peft]"], "no adapter.json there"),
        ([f"models=[{tmp_path}/cut]"], "missing or damaged"),
        ([f"models=[{tmp_path}/gone]"], "no such folder"),
        (["models=[tiny-llama-randm]"], "e.g. 'tiny-llama-random'"),
        (["every.n=5000"], "need at most"),
    ):
        with pytest.raises(InputError) as error:
            evaluate_sft(config.override(values), tmp_path / "out", progress=False)
        assert told in str(error.value) and "\n" not in str(error.value), (values, str(error.value))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.parquet"))


def test_configs_name_what_is_wrong():
    for values, told in (
        ({"target": "emotoin"}, "'emotion'"),
        ({"tests": ["referenc"]}, "'reference'"),
        ({"modles": ["a"]}, "'models'"),
        ({"every": {"n": 0}}, "every.n=0"),
        ({"models": ["runs/a", "b/a"]}, "names two rows"),
        ({"models": ["runs/human"]}, "names two rows"),
        ({"least_recall": 1.5}, "least_recall=1.5"),
    ):
        with pytest.raises(InputError, match=told):
            SFTEvaluationConfig.from_dict(values)


def test_mask_prints_a_page_and_names_what_it_does_not_know(tmp_path):
    page = tmp_path / "mask.html"
    command = ["sft", "mask", "--model", "tiny-llama-random"]
    done = CliRunner().invoke(cli, [*command, "--html", str(page)])
    assert done.exit_code == 0 and "<html" in page.read_text() and "[EMOTION]" in page.read_text()
    first = next(iter(load_corpus())).id
    piped = CliRunner().invoke(cli, [*command, "--dialogue", first])
    assert piped.exit_code == 0 and "<|im_end|>»" in piped.output and "\x1b" not in piped.output
    for wrong, told in (
        (["--template", "outinst"], "'out_inst'"),
        (["--target", "emotions"], "'emotion'"),
        (["--dialogue", first[:-1]], f"'{first}'"),
        (["--data", "smaple"], "smaple"),
    ):
        failed = CliRunner().invoke(cli, [*command, *wrong])
        assert failed.exit_code == 2 and told in failed.output and len(failed.output.splitlines()) == 1, (
            failed.output
        )
    bare = write_jsonl(load_corpus().dialogues[:1], tmp_path / "bare.jsonl")
    text = bare.read_text().replace('"happiness"', "null").replace('"no_emotion"', "null")
    bare.write_text(text)
    failed = CliRunner().invoke(cli, [*command, "--data", str(bare)])
    assert failed.exit_code == 2 and "has no emotion" in failed.output


def test_a_check_imports_no_model_library(place):
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom llama_dialogue.app.cli import cli\n"
        f"done = CliRunner().invoke(cli, ['sft', 'eval', '--models', 'tiny-llama-random,{place}/outside', '--check'])\n"
        "print(done.exit_code, 'torch' in sys.modules, 'pandas' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout.split() == ["0", "False", "False"], done.stdout + done.stderr


def test_a_check_names_an_adapter_that_is_not_trained_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    config = SFTEvaluationConfig(models=("tiny-llama-random", "runs/coming"))
    states = {row["value"]: row["state"] for row in check_job(SFT_EVALUATION, config)["inputs"]}
    assert states["tiny-llama-random"] == "there" and "missing" in states["runs/coming"]
