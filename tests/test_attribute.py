"""Artefacts, readers and evaluations: hashes that records hold, known replies found anywhere, one line for every fault."""

import json
import random

import numpy as np
import pytest
import torch
from shell import config_file, run
from transformers import BertConfig, BertModel

from llama_dialogue.attribute import configs
from llama_dialogue.attribute.evaluation import evaluate_job, load_reader
from llama_dialogue.attribute.head import AttributeHead, HeadReader
from llama_dialogue.attribute.judge import Judge, JudgeNetwork, turn_examples
from llama_dialogue.attribute.sample_corpus import CorpusCardConfig
from llama_dialogue.core.artifacts import artifact_sha256
from llama_dialogue.core.classification import (
    MajorityBaseline,
    Reader,
    TfidfBaseline,
    drop_train_duplicates,
    target_labels,
)
from llama_dialogue.core.dialogues import Dialogue, Example, Turn, load_corpus, make_examples, write_jsonl
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.fingerprints import Fingerprints
from llama_dialogue.core.models import load_encoder, tiny_chat_model
from llama_dialogue.core.records import RunRecord, results_dir
from llama_dialogue.core.targets import ACT, ACTS
from llama_dialogue.core.texts import nearest_texts
from llama_dialogue.perturb.distil import Offsets
from llama_dialogue.perturb.vectors import SteeringVectors

JOBS = {
    "head": configs.HeadTrainingConfig,
    "judge": configs.JudgeTrainingConfig,
    "evaluation": configs.EvaluationConfig,
    "probes": configs.ProbeConfig,
    "feature-bench": configs.FeatureBenchConfig,
    "corpus-card": CorpusCardConfig,
}
RECORDS = [
    path
    for path in sorted((results_dir() / "attribute").glob("*.json"))
    if not path.stem.startswith("context-baseline")
]


def counted(*shape) -> torch.Tensor:
    "Numbers in eighths, from 0 on."
    return torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape) / 8


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("sample")


@pytest.fixture(scope="module")
def tiny():
    return tiny_chat_model()


def make_judge(**options) -> Judge:
    _, words = load_encoder()
    size = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    encoder = BertModel(BertConfig(vocab_size=len(words), **size), add_pooling_layer=False)
    config = configs.JudgeConfig(context_turns=2)
    return Judge(JudgeNetwork(encoder, 4, config), words, config, **options)


def make_head(tiny, **options) -> AttributeHead:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    report = {"model": tiny.name, "target": "act"}
    return AttributeHead(
        weight, torch.zeros(4), ACTS, model_sha=tiny.sha256, prompt="none", report=report, **options
    )


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_config_is_that_of_its_record(path):
    record = RunRecord.load(path)
    ours = JOBS[record.job].from_yaml(config_file(path))
    assert ours == JOBS[record.job].from_dict(record.config) and ours.name == record.name
    assert set(record.config) <= set(ours.to_dict())


# --- artefacts --------------------------------------------------------------------------------------------------


def artefacts():
    small = dict(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    network = JudgeNetwork(BertModel(BertConfig(**small), add_pooling_layer=False), 4, configs.JudgeConfig())
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(counted(*p.shape))
    words, sha = load_encoder()[1], "a" * 64
    return {
        "head": AttributeHead(counted(4, 6), counted(4), ACTS, 3, "steering", sha, "speaker"),
        "vectors": SteeringVectors(counted(4, 2, 6), counted(2), counted(4, 2), ACTS, (1, 2), sha, {}),
        "offsets": Offsets(counted(4, 1, 2, 3), counted(4, 1, 2, 3) + 1, ACTS, (1,), sha, {}, {}),
        "judge": Judge(network, words, configs.JudgeConfig(context_turns=2), "act", 1.25, [0.5, 0, 0, 0]),
    }


HASHES = {  # of the code that wrote the records
    "head": "6b268874e5adb2831318d6fe00831b08b421166602981cf65264f5b17d73c29c",
    "vectors": "1a39fd65bac495c8f7bfdd51a6caf5c122d01a3abcf19a6c537e45dac70a7b5e",
    "offsets": "bdb6dccf910340c6e697b829277aa81db1868a6b6fc028dd13ed88ce16dae7c1",
    "judge": "4d7534cec3f46288e147f6013eda17a87f6691a2dadf4b5be9ed4e3397c3f178",
}


@pytest.mark.parametrize("kind", HASHES)
def test_hash_is_the_one_that_records_hold(kind, tmp_path):
    made = artefacts()[kind]
    assert (made.sha256, made.name) == (HASHES[kind], "unsaved")
    again = type(made).from_pretrained(made.save_pretrained(tmp_path / "my model"))
    assert (again.sha256, again.name) == (HASHES[kind], "my model")
    assert type(made).from_pretrained(tmp_path / "my model", name="default").name == "default"


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize(
    "damage", ["no json", "half a json", "an entry less", "half the weights", "no weights"]
)
def test_damaged_artefact_is_one_line(kind, damage, tmp_path):
    made = artefacts()[kind]
    folder = made.save_pretrained(tmp_path / kind)
    weights = folder / ("model.safetensors" if kind == "judge" else f"{kind}.safetensors")
    about = folder / f"{kind}.json"
    if damage == "no json":
        about.unlink()
    elif damage == "half a json":
        about.write_text(about.read_text()[:40])
    elif damage == "an entry less":
        about.write_text(
            json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "classes"})
        )
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[:-40])
    else:
        weights.unlink()
    with pytest.raises(InputError) as told:
        type(made).from_pretrained(folder)
    assert kind in str(told.value) and "\n" not in str(told.value) and "need a folder" in str(told.value)


def test_artefact_without_fingerprints_reads(tmp_path, tiny):
    head = make_head(tiny)
    assert AttributeHead.from_pretrained(head.save_pretrained(tmp_path / "head")).train_replies is None
    head.train_replies = Fingerprints.of(["I will be there at nine in the morning."])
    head.save_pretrained(tmp_path / "head")
    assert len(AttributeHead.from_pretrained(tmp_path / "head").train_replies) == 1
    (tmp_path / "head" / "train_replies.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="train_replies.safetensors: missing or damaged"):
        AttributeHead.from_pretrained(tmp_path / "head")


# --- readers ----------------------------------------------------------------------------------------------------


class Rule:
    "A question mark makes a question."

    target, classes, sha256 = ACT, ACTS, artifact_sha256("?")

    def predict(self, examples):
        return torch.tensor(
            [[0.01, 0.97, 0.01, 0.01] if "?" in e.reply.text else [0.25] * 4 for e in examples]
        ).log()


@pytest.fixture(scope="module", params=["head", "judge", "words", "majority", "rule"])
def reader(request, corpus, tiny):
    train, validation = (
        turn_examples([d for d in corpus if d.split == split])[:300] for split in ("train", "validation")
    )
    return {
        "head": lambda: HeadReader(make_head(tiny), tiny),
        "judge": make_judge,
        "words": lambda: TfidfBaseline("act").fit(train, validation),
        "majority": lambda: MajorityBaseline("act").fit(train),
        "rule": Rule,
    }[request.param]()


def test_reader(reader, corpus):
    assert isinstance(reader, Reader)
    assert reader.target is ACT and reader.classes == ACTS and len(reader.sha256) == 64
    examples = [e for e in make_examples(corpus.dialogues[:6]) if len(e.context) == 1]
    log_probs = reader.predict(examples)
    assert log_probs.shape == (len(examples), 4) and log_probs.isfinite().all()
    assert torch.allclose(log_probs.exp().sum(1).double(), torch.ones(len(examples)).double(), atol=1e-5)
    assert torch.allclose(reader.predict(examples[:2]), log_probs[:2], atol=1e-5)


@pytest.mark.parametrize("missing", ["predict", "sha256", "target", "classes"])
def test_not_a_reader(missing):
    without = type("Other", (), {k: v for k, v in vars(Rule).items() if k != missing and k[0] != "_"})
    assert not isinstance(without(), Reader)


def test_labels():
    unlabelled = [Example("0" * 16, (), Turn("Well.", act="inform")), Example("1" * 16, (), Turn("Hm."))]
    with pytest.raises(InputError, match="reply 1+-0 has no act"):
        target_labels(unlabelled, "act")
    with pytest.raises(InputError, match="'question' has no training example"):
        target_labels(unlabelled[:1], "act", every_class=True)
    assert target_labels([], "act").dtype == torch.long


# --- known replies ----------------------------------------------------------------------------------------------


def changed(text: str, number: int, draw: random.Random) -> str:
    "Replace, drop or insert some words."
    words = text.split()
    for _ in range(number):
        place = draw.randrange(len(words))
        words[place : place + draw.randint(0, 1)] = draw.choice([[], ["perhaps"], ["quite", "so"]])
        words = words or ["so"]
    return " ".join(words)


@pytest.mark.parametrize("seed", range(3))
def test_fingerprints_find_near_copies(corpus, seed):
    draw = random.Random(seed)
    texts = sorted({t.text for d in corpus for t in d.turns})
    base = draw.sample(texts, 1200)
    asked = [changed(t, n, draw) for t in texts for n in (1, 3) if len(t.split()) >= 5]
    exact = np.array([s for s, _ in nearest_texts(asked, base, threshold=0.05)])
    estimate = Fingerprints.of(base).similarity(asked)
    near = exact >= 0.5
    assert near.sum() > 500 and (estimate[near] >= 0.45).mean() >= 0.95
    assert (estimate[exact < 0.4] >= 0.45).mean() < 0.01
    assert np.abs(estimate - exact)[exact > 0.3].mean() < 0.04


def test_fingerprints_of_odd_texts():
    prints = Fingerprints.of(["", "?!", "one", "One!", "See you at six, then."])
    assert len(prints) == 3 and prints.contains(["ONE", "two"]).tolist() == [True, False]
    assert prints.similarity(["", "... ... ...", "one two three four five"]).max() < 0.45
    assert len(Fingerprints.of([])) == 0 and Fingerprints.of([]).similarity(["a b c"]).tolist() == [0]
    assert Fingerprints.of([]).contains(["a"]).tolist() == [False] and prints.similarity([]).shape == (0,)


@pytest.mark.parametrize("train", [[], Fingerprints.of([])], ids=["examples", "fingerprints"])
def test_nothing_is_known_without_training_replies(corpus, train):
    test = make_examples(corpus.dialogues[:5])
    kept, counts = drop_train_duplicates(test, train)
    assert kept == test and counts == {"tested": len(test), "exact": 0, "near": 0, "kept": len(test)}


# --- evaluation -------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, corpus):
    "A corpus that has a test part only: ten rows, no commissive, in a path with spaces."
    turns = [
        t for d in corpus if d.split == "test" for t in d.turns if t.act != "commissive" and len(t.text) > 30
    ]
    pairs = zip(turns[:20:2], turns[1:20:2], strict=True)
    rows = [Dialogue((Turn("Hi!", act="inform"), a, b), split="test") for a, b in pairs]
    return write_jsonl(rows, tmp_path / "a corpus" / "only test.jsonl")


@pytest.fixture
def known_judge(tmp_path, elsewhere):
    "A judge whose training had three of the replies of that corpus, one with another word in it."
    replies = [e.reply.text for e in make_examples(load_corpus(elsewhere), all_turns=True)]
    words = max(replies[2:], key=lambda t: len(t.split())).split()
    near = " ".join([*words[:-1], "tomorrow"])
    judge = make_judge(train_replies=Fingerprints.of([replies[0], replies[1].upper(), near]))
    return judge.save_pretrained(tmp_path / "a judge")


def test_eval_of_a_corpus_with_a_test_part_only(elsewhere, known_judge, capsys, tmp_path):
    arguments = ["attribute", "eval", known_judge, "--data", elsewhere, "--split", "test"]
    code, out, err = run([*arguments, "--records", tmp_path / "my records", "--json"], capsys)
    assert code == 0, err
    record = RunRecord.load(tmp_path / "my records" / "attribute" / "evaluation.json")
    assert record.details["overlap"] == {"tested": 20, "exact": 2, "near": 1, "kept": 17}
    assert record.details["duplicates"] == [
        "a judge: compared with its 3 training replies, 2 as texts, 1 by fingerprints"
    ]
    assert set(record.scores) == {"this model"} and record.scores["this model"]["accuracy"].n == 17
    assert set(record.inputs) == {"data", "judge"} and record.inputs["judge"]["name"] == "a judge"
    assert record.inputs["judge"]["sha256"] == Judge.from_pretrained(known_judge).sha256
    assert "f1_commissive" not in record.scores["this model"] or record.details["confusion"]["commissive"]


def test_eval_keeps_known_replies_if_asked(elsewhere, known_judge):
    config = configs.EvaluationConfig(model=str(known_judge), keep_train_duplicates=True)
    record = evaluate_job(config.override([f"examples.data={elsewhere}"]), progress=False)
    assert record.scores["this model"]["accuracy"].n == 20 and record.details["overlap"]["kept"] == 17


def test_eval_without_fingerprints_says_so_in_one_line(elsewhere, capsys, tmp_path):
    folder = make_judge().save_pretrained(tmp_path / "old")
    code, _, err = run(
        ["attribute", "eval", folder, "--data", elsewhere, "--records", tmp_path / "records"], capsys
    )
    first, *bars = err.splitlines()
    assert code == 0 and first.endswith("could not be left out of the test")
    assert first.startswith("note: old: ") and not any("note" in line for line in bars)
    record = RunRecord.load(tmp_path / "records" / "attribute" / "evaluation.json")
    assert record.details["overlap"]["kept"] == 20 and "could not" in record.details["duplicates"][0]


@pytest.mark.parametrize(
    "options, told",
    {
        "balanced": (["--balanced"], "no tested reply is labelled 'commissive'"),
        "split": (["--split", "validation"], "no labelled reply in split 'validation'"),
        "target": (["--target", "emotion"], "need the same, e.g. examples.target=act"),
        "share": (["--share", "judges"], "'judge'"),
        "other": (["--set", "other=no/such"], "no/such"),
    }.values(),
)
def test_eval_that_cannot_be_done_is_one_line(options, told, elsewhere, known_judge, capsys, tmp_path):
    arguments = ["attribute", "eval", known_judge, "--data", elsewhere, "--records", tmp_path / "records"]
    code, _, err = run([*arguments, *options], capsys)
    assert code == 2 and told in err and err.count("\n") == 1
    assert not list((tmp_path / "records").rglob("*.json"))


def test_eval_of_nothing_but_known_replies(elsewhere, tmp_path):
    replies = [e.reply.text for e in make_examples(load_corpus(elsewhere), all_turns=True)]
    assert all(len(text.split()) >= 5 for text in replies)
    folder = make_judge(train_replies=Fingerprints.of(replies)).save_pretrained(tmp_path / "judge")
    config = configs.EvaluationConfig(model=str(folder)).override([f"examples.data={elsewhere}"])
    with pytest.raises(InputError, match="all 20 replies are known from the training"):
        evaluate_job(config, progress=False)


def test_two_models_of_two_kinds(corpus, known_judge, tmp_path, tiny):
    head = make_head(tiny, train_replies=Fingerprints.of([corpus.dialogues[0].turns[1].text]))
    head.save_pretrained(tmp_path / "head")
    assert isinstance(load_reader(tmp_path / "head", tiny), HeadReader)
    config = configs.EvaluationConfig(model=str(tmp_path / "head"), other=str(known_judge))
    record = evaluate_job(config.override(["examples.max_dialogues=12"]), progress=False, chat=tiny)
    assert set(record.inputs) == {"data", "head", "other", "model"}
    assert set(record.scores) == {"this model", "other", "both", "words", "majority"}
    assert len(record.details["duplicates"]) == 2
