"""A method and a target from somebody else's package work wherever ours do, and a broken package stops nobody."""

import importlib
import sys

import pandas as pd
import pytest
import torch
from shell import run
from tiny import make_head, make_judge

from llama_dialogue.app import commands as app_commands
from llama_dialogue.attribute.features import example_features, reply_features
from llama_dialogue.attribute.head import fit_head
from llama_dialogue.compare.cells import GridConfig, expand_cells
from llama_dialogue.compare.grid import run_grid
from llama_dialogue.compare.markdown import write_report
from llama_dialogue.compare.methods import SteeringConfig, SteeringInputs, get_method, steer
from llama_dialogue.compare.scored import read_scores
from llama_dialogue.compare.scores import score_grid
from llama_dialogue.core.contexts import ContextConfig, draw_contexts
from llama_dialogue.core.dialogues import Example, Turn
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.grid import read_parts
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.plugins import list_plugins
from llama_dialogue.core.targets import get_target
from llama_dialogue.prompting.prompts import build_prompt

TOY = '''
from llama_dialogue.compare.methods import Method
from llama_dialogue.core.config import Config, frozen
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.targets import Target

TONE = Target("tone", ("polite", "blunt"))


@frozen
class ToyOptions(Config):
    volume: int = 2  # most exclamation marks

    def __post_init__(self):
        if self.volume < 1:
            raise InputError(f"volume={self.volume}: need at least 1, e.g. volume=2")


def shout(request):
    """Reply plainly, then add marks: how many depends on the row's seed."""
    from llama_dialogue.core.generation import as_generations, generate

    chat, volume = request.chat, request.options(TOY).volume
    mark = chat.tokenizer("!", add_special_tokens=False).input_ids
    plain = generate(chat.model, chat.tokenizer, request.prompts(), request.config.decoding, seeds=request.seeds)
    marks = [mark * (1 + seed % volume) for seed in request.seeds]
    token_ids = [ids + more for ids, more in zip(plain.token_ids, marks, strict=True)]
    return as_generations(chat.model, chat.tokenizer, token_ids, [False] * len(token_ids))


TOY = Method("toy", "toy shouting", ToyOptions, shout, costly=("volume",))
'''
POINTS = """[llama_dialogue.methods]
toy = toy_steering:TOY
[llama_dialogue.targets]
tone = toy_steering:TONE
"""
BROKEN = "import a_package_that_nobody_has\n"
BROKEN_POINTS = """[llama_dialogue.methods]
broken = broken_steering:BROKEN
"""


def install(folder, name, source, points):
    """Put a package into a folder as pip would."""
    (folder / f"{name}.py").write_text(source)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(points)


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory):
    """Install a toy package and a broken one for this module's tests."""
    folder = tmp_path_factory.mktemp("site")
    install(folder, "toy_steering", TOY, POINTS)
    install(folder, "broken_steering", BROKEN, BROKEN_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.invalidate_caches()
        list_plugins.cache_clear()
        importlib.reload(app_commands)  # it has an option for each target
        yield
    sys.modules.pop("toy_steering", None)
    list_plugins.cache_clear()
    importlib.reload(app_commands)


SMALL = {
    "name": "toys",
    "system": "none",
    "decoding": {"max_new_tokens": 4},
    "model": "tiny-llama-random",
    "dtype": "fp32",
    "contexts": {"n": 3, "max_context": 3},
}
CELLS = [
    {"method": "none"},
    {"method": "toy", "toy": {"volume": [1, 9]}},
    {"method": "best_of_n", "best_of_n": {"of": "toy", "n": 4}, "toy": {"volume": 9}},
]
LABELS = [
    "unsteered",
    "toy shouting, volume 1",
    "toy shouting, volume 9",
    "best of 4, toy shouting, volume 9",
]


def make_config(**values):
    return GridConfig.from_dict(SMALL | {"cells": CELLS} | values)


# --- a method ---------------------------------------------------------------------------------------------------


def test_it_is_listed(capsys):
    for kind, name, place in (
        ("methods", "toy", "toy_steering:TOY"),
        ("methods", "broken", "broken_steering:BROKEN"),
        ("targets", "tone", "toy_steering:TONE"),
    ):
        code, out, _ = run([kind], capsys)
        row = next(line.split() for line in out.splitlines() if line.startswith(name))
        assert code == 0 and row == [name, place.split(":")[0], place]
    assert "broken_steering" not in sys.modules


REPLY = ["reply", "--context", "Is it late?", "--model", "tiny-llama-random", "--act", "question"]
REPLY += ["--set", "system=none", "--set", "decoding.max_new_tokens=4", "--seed", "2"]


def test_it_replies(capsys):
    code, out, _ = run([*REPLY, "--method", "toy", "--set", "toy.volume=5"], capsys)
    assert code == 0 and out.endswith("!!!\n") and not out.endswith("!!!!\n")


@pytest.mark.parametrize(
    "value, told",
    [
        ("toy.volum=3", "unknown key 'toy.volum': need one of volume, e.g. 'toy.volume'"),
        ("toy.volume=loud", "toy.volume='loud': need a whole number"),
        ("toy.volume=0", "toy.volume=0: need at least 1"),
    ],
)
def test_its_options_are_checked_by_its_own_config(value, told, capsys):
    code, out, err = run([*REPLY, "--method", "toy", "--set", value], capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and told in err
    with pytest.raises(InputError, match="^cells.2.: toy.volume=0: need at least 1"):
        expand_cells(make_config(cells=[*CELLS[:2], {"method": "toy", "toy": {"volume": [2, 0]}}]))


def test_its_options_block_no_other_method(capsys):
    code, out, _ = run([*REPLY, "--method", "prompt", "--set", "toy.volum=loud"], capsys)
    assert code == 0 and out.strip()
    config = make_config(toy={"volum": 3}, cells=[{"method": "none"}, {"method": "toy"}])
    with pytest.raises(InputError, match="^cells.1.: unknown key 'toy.volum'"):
        expand_cells(config)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A grid of the toy method, run and scored."""
    out = tmp_path_factory.mktemp("grid") / "toys"
    run_grid(make_config(), out, progress=False, inputs=SteeringInputs(head=make_head()))
    score_grid(out, judge=make_judge(), progress=False)
    return out


def test_it_runs_in_a_grid_and_best_of_n_chooses_from_it(scored):
    rows = read_parts(scored)
    assert list(dict.fromkeys(rows.cell)) == LABELS and len(rows) == len(LABELS) * 3 * 4
    marks = {cell: own.reply.str.extract("(!*)$")[0].str.len() for cell, own in rows.groupby("cell")}
    assert set(marks[LABELS[1]]) == {1} and set(marks[LABELS[2]]) <= set(range(1, 10))
    chat, head = tiny_chat_model(), make_head()
    example = draw_contexts(ContextConfig(n=1, max_context=3))[0]
    options = {"toy": {"volume": 9}, "best_of_n": {"of": "toy", "n": 4}}
    config = SteeringConfig.from_dict({name: SMALL[name] for name in ("system", "decoding")} | options)
    best = steer(
        "best_of_n", chat, [example.context], ["question"], SteeringInputs(head=head), config, seed=5
    )
    tried = []

    def spy(request):
        tried.extend(get_method("toy").run(request).token_ids)
        return get_method("toy").run(request)

    toy = get_method("toy")
    method = type(toy)("toy", toy.label, toy.config, spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_dialogue.compare.plain_methods.get_method", lambda name: method)
        steer("best_of_n", chat, [example.context], ["question"], SteeringInputs(head=head), config, seed=5)
    prompt = build_prompt(chat.tokenizer, example.context, "none")
    likely = head(reply_features(chat, [prompt] * 4, tried))[:, 1]
    assert len(tried) == 4 and best.token_ids[0] == tried[int(likely.argmax())]


def test_it_is_scored_and_reported(scored, tmp_path, capsys):
    grid = read_scores(scored)
    assert grid.steered == LABELS and grid.rows[grid.rows.cell == LABELS[1]].probability.between(0, 1).all()
    path, table = write_report(scored, tmp_path)
    assert list(table.method) == ["none", "toy", "toy", "best_of_n", "human", "human"]
    assert table["toy.volume"].tolist()[1:4] == [1, 9, 9] and table.of[LABELS[3]] == "toy"
    text = path.read_text()
    assert all(label in text for label in LABELS) and "best of n, toy shouting" in text
    for name in ("report.csv", "report_classes.csv", "report__control.png", "report__cost.png"):
        assert (tmp_path / name).stat().st_size > 500, name
    code, out, _ = run(["report", str(scored), "--out", str(tmp_path / "again")], capsys)
    assert code == 0 and "toy shouting, volume 9" in out


def test_a_broken_package_is_named_in_one_line(scored, capsys):
    told = "method 'broken' of package broken_steering: cannot be imported (ModuleNotFoundError: No module"
    code, out, err = run([*REPLY, "--method", "broken"], capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and told in err
    with pytest.raises(InputError) as caught:
        expand_cells(make_config(cells=[*CELLS, {"method": "broken"}]))
    assert str(caught.value).startswith(f"cells[3]: {told}") and "\n" not in str(caught.value)
    assert len(expand_cells(make_config(broken={"key": 1}))) == 4


# --- a target ---------------------------------------------------------------------------------------------------

POLITE = [
    "Would you mind, please?",
    "Thank you so much, that is kind.",
    "Please, after you.",
    "May I, please?",
]
BLUNT = ["No.", "Wrong. Move.", "Shut it.", "Go away now."]
STEERED = [
    {"method": ["none", "prompt"]},
    {"method": "best_of_n", "best_of_n": {"n": 4}},
    {"method": "pplm", "pplm": {"layers": "all", "step_size": 1.0}},
]


def make_tone_head(chat):
    """Fit a head to eight replies, which it learns by heart."""
    context = (Turn("Can I have this seat?"),)
    examples = [Example("0" * 16, context, Turn(text)) for text in (*POLITE, *BLUNT)]
    features, labels = example_features(chat, examples, system="none"), torch.tensor([0] * 4 + [1] * 4)
    tone = get_target("tone")
    made_for = dict(pooling="steering", model_sha=chat.sha256, prompt="none")
    return fit_head(features, labels, (features, labels), tone.classes, penalties=(1.0, 0.1), **made_for)


def test_a_target_of_one_s_own(tmp_path):
    chat = tiny_chat_model()
    head, out = make_tone_head(chat), tmp_path / "grid"
    config = make_config(target="tone", cells=STEERED, contexts={"n": 4, "max_context": 3})
    run_grid(config, out, progress=False, chat=chat, inputs=SteeringInputs(head=head))
    judge = make_judge(target="tone").save_pretrained(tmp_path / "judge")
    scores = score_grid(out, judge=judge, progress=False)
    assert set(scores.target_class) == set(scores.judged) | {"polite", "blunt"} == {"polite", "blunt"}
    cells = list(dict.fromkeys(scores.cell))
    assert len(cells) == 4 and len(scores) == 4 * 4 * 2, "no reply of the corpus has a tone: no human row"
    rows = read_parts(out)
    examples = {e.dialogue_id: e for e in draw_contexts(config.contexts)}
    prompts = [build_prompt(chat.tokenizer, examples[i].context, "none") for i in rows.dialogue_id]
    likely = head(reply_features(chat, prompts, rows.token_ids.tolist())).detach()
    asked = torch.tensor([head.classes.index(name) for name in rows.target_class])
    own = pd.Series(likely.gather(1, asked[:, None])[:, 0].tolist()).groupby(rows.cell).mean()
    assert own[cells[2]] > own["unsteered"] and own[cells[3]] > own["unsteered"], own
    path, table = write_report(out)
    assert "polite" in path.read_text() and "share_blunt" in table


def test_a_reply_towards_it(capsys, tmp_path):
    make_tone_head(tiny_chat_model()).save_pretrained(tmp_path / "head")
    asked = [*REPLY[:5], "--tone", "polite", *REPLY[7:], "--method", "best_of_n"]
    code, out, _ = run([*asked, "--set", f"inputs.head={tmp_path / 'head'}", "--json"], capsys)
    assert code == 0 and '"target": "tone"' in out and '"class": "polite"' in out
    code, out, err = run([*asked[:6], "polit", *asked[7:]], capsys)
    assert code == 2 and err.count("\n") == 1 and "'polite'" in err


def test_no_default_head_or_judge_for_it(tmp_path):
    config = make_config(target="tone", cells=[{"method": "best_of_n"}])
    with pytest.raises(InputError, match="not labelled for it"):
        run_grid(config, tmp_path / "grid", progress=False)
    run_grid(make_config(target="tone", cells=[{"method": "none"}]), tmp_path / "grid", progress=False)
    with pytest.raises(InputError, match="not labelled for it"):
        score_grid(tmp_path / "grid", progress=False)
