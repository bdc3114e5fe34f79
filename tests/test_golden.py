"""What the code did before it was restructured, in float32: the same seeds give the same replies and scores.

tests/golden was made at commit 9c6d474: inputs/ are folders of heads, vectors and offsets that its code had saved,
golden.json and slow.json hold replies, scores, cells and report numbers in the names of then.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from llama_dialogue.attribute.configs import JudgeConfig
from llama_dialogue.attribute.features import encode_replies
from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.attribute.judge import Judge, JudgeNetwork
from llama_dialogue.compare.cells import GridConfig, expand_cells
from llama_dialogue.compare.methods import (
    SteeringConfig,
    SteeringInputs,
    all_needs,
    get_method,
    resolve_name,
    resolve_options,
    steer,
)
from llama_dialogue.compare.report import compare_cells
from llama_dialogue.compare.scored import ScoredGrid
from llama_dialogue.compare.scores import GridContexts, ReplyScorer, human_replies
from llama_dialogue.core import generation
from llama_dialogue.core.dialogues import Example, Turn
from llama_dialogue.core.generation import count_forward_equivalents, derive_seed
from llama_dialogue.core.migration import cell_label
from llama_dialogue.core.models import load_chat_model, load_encoder, tiny_chat_model
from llama_dialogue.core.paths import checkout_dir, sha256_file
from llama_dialogue.core.records import RunRecord, load_rows, results_dir
from llama_dialogue.core.statistics import Interval
from llama_dialogue.core.targets import ACT
from llama_dialogue.perturb.distil import Offsets
from llama_dialogue.perturb.layers import select_layers
from llama_dialogue.perturb.vectors import SteeringVectors
from llama_dialogue.prompting.prompts import build_prompt, class_instruction

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
SLOW = json.loads((FOLDER / "slow.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in [*GOLDEN["cases"], *SLOW["cases"]]}
EXAMPLES = {
    name: Example(e["dialogue_id"], tuple(Turn(text) for text in e["context"]), Turn(e["reply"], e["act"]))
    for name, e in GOLDEN["examples"].items()
}
OPTIONS = {  # name of then -> where it stands today
    **{name: f"pplm.{name}" for name in ("layers", "step_size", "num_iterations", "gm_scale", "kl_scale")},
    **{
        name: f"decoding.{name}"
        for name in ("max_new_tokens", "sample", "temperature", "top_k", "batch_size")
    },
    "repetition_penalty": "decoding.repetition_penalty",
    "pplm_batch_size": "pplm.batch_size",
    "best_of": "best_of_n.n",
    "vector_layer": "vector.layer",
    "vector_strength": "vector.strength",
    "distilled_strength": "offsets.strength",
    "guide_strength": "guided.strength",
    "guide_top_k": "guided.top_k",
    "guide_batch_size": "guided.batch_size",
    "system": "system",
}


def nested(method: str, options: dict) -> SteeringConfig:
    """Write flat options of all methods as those of one method, and of the one that it wraps."""
    name, values = resolve_name(method)
    values = {key: dict(value) for key, value in values.items()}
    wanted = {"decoding", "system", name, *(value["of"] for value in values.values())}
    for key, value in (GOLDEN["defaults"] | options).items():
        group, _, last = OPTIONS[key].rpartition(".")
        if (group or last) in wanted:
            (values.setdefault(group, {}) if group else values)[last] = value
    if name == "best_of_n":
        values[name] = {"of": "none"} | values[name]
    return SteeringConfig.from_dict(values)


# --- replies ----------------------------------------------------------------------------------------------------


@cache
def load(name):
    """Load a model and what steers it, as their folders were written then."""
    chat = tiny_chat_model() if name == "tiny" else load_chat_model(name, "fp32", "cpu")
    kinds = {"head": AttributeHead, "vectors": SteeringVectors, "offsets": Offsets}
    folders = {kind: FOLDER / place for kind, place in GOLDEN["models"][name]["inputs"].items()}
    return chat, SteeringInputs(**{kind: kinds[kind].from_pretrained(path) for kind, path in folders.items()})


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_models_prompts_and_inputs(name):
    (chat, inputs), about = load(name), GOLDEN["models"][name]
    assert chat.sha256 == about["sha256"]
    for example, prompts in about["prompts"].items():
        for act, prompt in prompts.items():
            asked = class_instruction("act", act) if act else ""
            assert build_prompt(chat.tokenizer, EXAMPLES[example].context, "speaker", asked) == prompt
    for method, sha256 in about["steerer_sha256"].items():
        needs = all_needs(get_method(method), nested(method, {}).options)
        if len(needs) < 2:  # with two, their hashes were hashed
            assert [inputs.get(need).sha256 for need in needs] == [sha256] * len(needs), method


QUEUED = {  # work of several batches: waiting prompts take free places, so fewer tokens pad than were recorded then
    "tiny/prompt": 8508.0,
    "tiny/prompt_best_of_n": 12129.0,
    "tiny/guided_best_of_n": 9915.0,
    "tiny/none-batches": 2993.0,
    "tiny/guided-top4": 1680.0,
}


def check(case, monkeypatch):
    """Steer again and compare token for token, and pass for pass if each prompt is read whole, as it was then."""
    wanted = QUEUED.get(case["id"], case["forwards"])
    forwards = steer_again(case)
    if forwards < wanted - 1e-3:  # prompts that begin alike were read once
        monkeypatch.setattr(generation, "_shared_starts", each_alone)
        forwards = steer_again(case)
    assert forwards == pytest.approx(wanted, abs=1e-3) and wanted <= case["forwards"]


def each_alone(rows):
    """Find nothing that prompts share."""
    return [row[:-1] for row in rows], list(range(len(rows)))


def steer_again(case):
    """Steer, compare the replies, and count the forward equivalents."""
    chat, inputs = load(case["model"])
    contexts = [EXAMPLES[name].context for name in case["examples"]]
    ids = [EXAMPLES[name].dialogue_id for name in case["examples"]]
    seeds = [derive_seed(i, act, case["salt"]) for i, act in zip(ids, case["acts"], strict=True)]
    assert seeds == case["seeds"]
    config = nested(case["method"], case["options"])
    with count_forward_equivalents(chat.model) as count:
        out = steer(case["method"], chat, contexts, case["acts"], inputs, config, seeds=seeds)
    for name in ("token_ids", "replies", "stopped", "failed"):
        assert getattr(out, name) == case[name], name
    return count.forward_equivalents


@pytest.mark.parametrize("case", [case["id"] for case in GOLDEN["cases"]])
def test_the_same_seeds_give_the_same_replies(case, monkeypatch):
    check(CASES[case], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case["id"] for case in SLOW["cases"]])
def test_more_replies(case, monkeypatch):
    check(CASES[case], monkeypatch)


def test_seeds():
    for parts, seed in GOLDEN["derive_seed"]:
        assert derive_seed(*parts) == seed


# --- scores -----------------------------------------------------------------------------------------------------


def golden_judge():
    """Make a tiny judge whose weights are the same everywhere: each parameter is drawn from its own stream."""
    _, words = load_encoder()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(words), **size), add_pooling_layer=False)
    network = JudgeNetwork(encoder, 4, JudgeConfig())
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(network.named_parameters())):
            draw = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.copy_((2 * draw - 1) * (1.0 if parameter.ndim == 2 else 0.3))
            parameter += 1.0 * name.endswith("LayerNorm.weight")
    return Judge(network, words, JudgeConfig())


def flat(values):
    """Lay nested lists out; None is what JSON keeps of NaN."""
    for value in values:
        if isinstance(value, list | tuple | np.ndarray):
            yield from flat(value)
        else:
            yield np.nan if value is None else value


def same(found, kept, rel, abs):
    """Compare two columns: numbers within a tolerance, all else exactly."""
    found, kept = list(flat(found)), list(flat(kept))
    if any(isinstance(value, float) for value in kept):
        return np.allclose(np.array(found, float), np.array(kept, float), rtol=rel, atol=abs, equal_nan=True)
    return found == kept


@pytest.mark.parametrize("name", GOLDEN["scores"])
def test_scores(name):
    (chat, _), kept = load(name), GOLDEN["scores"][name]
    examples = {EXAMPLES[e].dialogue_id: EXAMPLES[e] for e in kept["examples"]}
    contexts, judge = GridContexts(examples, ACT, kept["system"], kept["k"]), golden_judge()
    assert judge.sha256 == kept["judge_sha256"] and {i: contexts.wrong[i] for i in examples} == kept["wrong"]
    scorer = ReplyScorer(contexts, chat, judge, tiny_chat_model(seed=1))
    for part, columns in kept["rows"].items():
        if human := part == "human":
            rows = human_replies(chat, contexts, 0)
            assert rows.token_ids.tolist() == encode_replies(chat, [e.reply.text for e in examples.values()])
        else:
            case = CASES[part]
            token_ids = [np.array(ids, dtype=np.int32) for ids in case["token_ids"]]
            rows = {
                "dialogue_id": [EXAMPLES[e].dialogue_id for e in case["examples"]],
                "reply": case["replies"],
            }
            rows = pd.DataFrame(rows | {"target_class": case["acts"], "token_ids": token_ids})
        scores = scorer.score(rows, human=human).rename(columns={"target_class": "act"})
        for column, values in columns.items():
            assert same(scores[column], values, rel=1e-4, abs=1e-4 if "nll" in column else 1e-6), (
                part,
                column,
            )


# --- cells, report, records -------------------------------------------------------------------------------------

CONFIGS = {"screen-dailydialog.yaml": "screen-dailydialog", "test-dailydialog.yaml": "test-dailydialog"}
CONFIGS |= {"seed_grid.yaml": "original-grid"}


@pytest.mark.parametrize("name", GOLDEN["cells"])
def test_cells(name):
    kept, file = GOLDEN["cells"][name], CONFIGS[name.split("@")[0]]
    cells = expand_cells(GridConfig.from_yaml(checkout_dir() / "configs" / "perturb" / f"{file}.yaml"))
    assert len(cells) == len(kept["cells"])

    def plain(steering):
        """Write layers as numbers, since names of ranges changed, and the size of a batch as it works out."""
        options = {n: resolve_options(get_method(n), steering.options).to_dict() for n in steering.options}
        if own := options.get("pplm"):
            layers = select_layers(own["layers"], kept["num_layers"])
            own["layers"] = [layers.start, layers.stop]
            own["batch_size"] = own["batch_size"] or steering.decoding.batch_size
        return steering.to_dict() | options

    for cell, (old_id, method, rest) in zip(cells, kept["cells"], strict=True):
        assert cell.method == resolve_name(method)[0]
        assert plain(cell.steering) == plain(nested(method, kept["common"] | rest)), old_id
        if file != "original-grid":
            assert cell.label == cell_label(old_id)


def test_report():
    kept = GOLDEN["report"]
    record, rows = RunRecord.load(checkout_dir() / kept["record"]), load_rows(checkout_dir() / kept["rows"])
    table = compare_cells(ScoredGrid.from_record(record, rows))
    assert list(table.index) == [cell_label(cell) for cell in kept["cells"]]
    for cell, columns in kept["cells"].items():
        row = table.loc[cell_label(cell)]
        for column, value in columns.items():
            found = row[column].to_dict() if isinstance(row[column], Interval) else {"value": row[column]}
            for key, number in (value if isinstance(value, dict) else {"value": value}).items():
                near = number if isinstance(number, str) else pytest.approx(number, rel=1e-9)
                assert found[key] == near, (cell, column)


RENAMED = {"attribute/together-act-dailydialog.json": "attribute/head-judge-agreement-act-dailydialog.json"}


def test_records_are_the_files_that_they_were():
    files = {path: sha for path, sha in GOLDEN["results_sha256"].items() if not path.endswith(".md")}
    found = {path: sha256_file(results_dir() / RENAMED.get(path, path)) for path in files}
    assert found == files
