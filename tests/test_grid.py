"""The grid: kills, damage, full disks and second helpers cost at most the shards under way, and never a wrong row."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.attribute.judge import Judge, JudgeConfig, JudgeNetwork
from llama_dialogue.compare import report
from llama_dialogue.compare.grid import (
    GridConfig,
    differing_share,
    expand_cells,
    grid_examples,
    plan_grid,
    run_grid,
)
from llama_dialogue.compare.scores import HUMAN, score_grid
from llama_dialogue.core import grid
from llama_dialogue.core.dialogues import load_corpus, write_jsonl
from llama_dialogue.core.errors import InputError, MachineError
from llama_dialogue.core.grid import WorkItem, check_engine, item_key, part_path, read_parts, run_items
from llama_dialogue.core.metrics import reply_nll
from llama_dialogue.core.models import load_encoder, tiny_chat_model
from llama_dialogue.core.paths import checkout_dir
from llama_dialogue.core.records import RunRecord, load_rows, save_rows
from llama_dialogue.core.reference_metrics import summed_reference_scores
from llama_dialogue.core.statistics import Interval
from llama_dialogue.core.targets import ACTS
from llama_dialogue.perturb.methods import SteeringConfig
from llama_dialogue.prompting.prompts import build_prompt

FORK = multiprocessing.get_context("fork")


def make_items(count, version=1):
    return [WorkItem({"id": f"cell {i}"}, i, 0, item_key(version, i)) for i in range(count)]


@dataclass(frozen=True)
class Work:
    """Write down which item was begun by whom, then do as told."""

    log: Path
    pause: float = 0.0  # seconds
    dies_at: int = -1  # shard whose first owner is killed

    def __call__(self, item):
        with open(self.log, "a") as log:
            log.write(f"{item.shard} {os.getpid()}\n")
        if item.shard == self.dies_at and not Path(f"{self.log}.died").exists():
            Path(f"{self.log}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        return pd.DataFrame({"cell": item.cell["id"], "number": [item.shard, item.shard**2]})


def begun(log):
    return [int(line.split()[0]) for line in log.read_text().splitlines()]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "grid"


def all_rows(count):
    return [n for i in range(count) for n in (i, i**2)]


def left_over(out):
    return [path.name for path in (out / "parts").iterdir() if path.suffix != ".parquet"]


# --- the engine -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, 5])
def test_kill_loses_only_the_item_under_way(out, log, at):
    victim = FORK.Process(target=run_items, args=(make_items(6), Work(log, dies_at=at), out))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    summary = run_items(make_items(6), Work(log), out)
    assert (summary.found, summary.computed) == (at, 6 - at)
    assert begun(log) == [*range(at + 1), *range(at, 6)]
    assert read_parts(out)["number"].tolist() == all_rows(6)


def test_kill_while_writing(out, log, monkeypatch):
    def killed_while_writing(rows, path):
        path.with_name(f".{path.name}.abcd1234").write_bytes(b"PAR1 half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    items = make_items(2)
    run_items(items[:1], Work(log), out)
    monkeypatch.setattr(grid, "save_rows", killed_while_writing)
    victim = FORK.Process(target=run_items, args=(items, Work(log), out))
    victim.start()
    victim.join()
    assert len(left_over(out)) == 1
    monkeypatch.undo()
    assert run_items(items, Work(log), out).computed == 1 and left_over(out) == []


def test_two_processes_do_nothing_twice(out, log):
    helpers = [FORK.Process(target=run_items, args=(make_items(12), Work(log, 0.05), out)) for _ in "ab"]
    [helper.start() for helper in helpers]
    [helper.join() for helper in helpers]
    assert sorted(begun(log)) == list(range(12)) and [h.exitcode for h in helpers] == [0, 0]
    assert len({line.split()[1] for line in log.read_text().splitlines()}) == 2
    assert read_parts(out)["number"].tolist() == all_rows(12)


def test_one_of_two_is_killed_and_the_other_does_the_rest(out, log):
    slow = Work(log, pause=60)
    victim = FORK.Process(target=run_items, args=(make_items(4), slow, out))
    victim.start()
    while not log.exists():
        time.sleep(0.01)
    helper = FORK.Process(target=run_items, args=(make_items(4), Work(log), out))
    helper.start()
    while len(list((out / "parts").glob("*.parquet"))) < 3:
        time.sleep(0.01)
    assert helper.is_alive(), "it waits for the item that the other one owns"
    victim.kill()
    helper.join()
    assert helper.exitcode == 0 and begun(log) == [0, 1, 2, 3, 0]
    assert read_parts(out)["number"].tolist() == all_rows(4)


DAMAGE = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "without its end": lambda whole: whole[:-1],
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "zeros in the middle": lambda whole: whole[:100] + bytes(200) + whole[300:],
    "another cell": lambda whole: whole.replace(b"cell 1", b"cell 7"),
    "something else": lambda whole: b"not found\n",
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_part_is_refused_and_computed_again(out, log, case, capsys):
    items = make_items(3)
    run_items(items, Work(log), out)
    part = part_path(out, items[1].key)
    part.write_bytes(DAMAGE[case](part.read_bytes()))
    with pytest.raises(InputError, match=f"{items[1].key} .* is damaged") as caught:
        read_parts(out)
    assert "\n" not in str(caught.value)
    summary = run_items(items, Work(log), out)
    assert summary.damaged == (items[1].key,) and (summary.found, summary.computed) == (2, 1)
    assert f"part {items[1].key} is damaged: it is computed again" in capsys.readouterr().err
    assert begun(log) == [0, 1, 2, 1] and read_parts(out)["number"].tolist() == all_rows(3)


def test_part_of_another_item_is_no_part(out, log):
    items = make_items(2)
    run_items(items, Work(log), out)
    shutil.copy(part_path(out, items[0].key), part_path(out, items[1].key))
    assert run_items(items, Work(log), out).damaged == (items[1].key,)


def test_changed_config_does_not_mix(out, log, capsys):
    run_items(make_items(3), Work(log), out)
    summary = run_items(make_items(2, version=2), Work(log), out)
    assert summary.computed == 2 and sorted(summary.stale) == sorted(i.key for i in make_items(3))
    assert "3 parts of another configuration" in capsys.readouterr().err
    assert read_parts(out)["number"].tolist() == all_rows(2)
    back = run_items(make_items(3), Work(log), out)
    assert (back.found, back.computed) == (3, 0) and read_parts(out)["number"].tolist() == all_rows(3)


def test_unfinished_grid_is_refused_unless_asked_for(out, log):
    items = make_items(3)
    run_items(items, Work(log), out)
    part_path(out, items[0].key).unlink()
    with pytest.raises(InputError, match="1 of 3 parts are missing"):
        read_parts(out)
    assert read_parts(out, partial=True)["number"].tolist() == [1, 1, 2, 4]


@pytest.fixture
def hears_ctrl_c():
    """A process that a script started in the background is deaf to Ctrl-C, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c(out, log, capsys, hears_ctrl_c):
    def interrupted(item):
        if item.shard == 2:
            signal.raise_signal(signal.SIGINT)
        return Work(log)(item)

    with pytest.raises(KeyboardInterrupt):
        run_items(make_items(5), interrupted, out, progress="powers")
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"interrupted: 2 of 5 parts are in {out}: run it again to go on"
    assert left_over(out) == []
    assert run_items(make_items(5), Work(log), out).found == 2


def test_full_disk_keeps_what_is_finished(out, log, monkeypatch):
    real, written = os.replace, []

    def full(source, target):
        if str(target).endswith(".parquet"):
            written.append(target)
            if len(written) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MachineError, match="the disk is full"):
        run_items(make_items(5), Work(log), out)
    assert left_over(out) == []
    assert run_items(make_items(5), Work(log), out).found == 2
    assert read_parts(out)["number"].tolist() == all_rows(5)


IN_A_SMALL_DISK = """
import sys
from pathlib import Path
import pandas as pd
from llama_dialogue.core.errors import MachineError
from llama_dialogue.core.grid import WorkItem, read_part, run_items
out = Path(sys.argv[1]) / "grid"
items = [WorkItem({}, i, 0, f"{i:024d}") for i in range(60)]
try:
    run_items(items, lambda item: pd.DataFrame({"number": [item.shard]}), out)
except MachineError as error:
    print(error)
done = sorted((out / "parts").iterdir())
assert 3 < len(done) < 60 and all(path.suffix == ".parquet" for path in done), done
print(sum(read_part(out, path.stem)["number"].tolist() == [i] for i, path in enumerate(done)) - len(done))
"""


def test_a_disk_that_is_really_full(tmp_path):
    private = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=128k none '{tmp_path}'"
    if not shutil.which("unshare") or subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    command = f"{mount} && exec '{sys.executable}' -c '{IN_A_SMALL_DISK}' '{tmp_path}'"
    done = subprocess.run([*private, command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout and done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize("where", ["file/grid", "file"])
def test_output_below_a_file(tmp_path, log, where):
    (tmp_path / "file").write_text("I am no folder")
    with pytest.raises(InputError, match="a file stands where a folder is needed"):
        run_items(make_items(1), Work(log), tmp_path / where)
    assert not log.exists()


def test_corpus_text_is_refused(out):
    with pytest.raises(InputError, match="corpus text"):
        run_items(make_items(1), lambda item: pd.DataFrame({"context": ["Hello."]}), out)
    assert not list((out / "parts").glob("*.parquet"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_list_of_parts(out, log, content):
    run_items(make_items(1), Work(log), out)
    (out / "grid.json").write_text(content)
    with pytest.raises(InputError, match="grid.json"):
        read_parts(out)
    assert run_items(make_items(1), Work(log), out).found == 1 and len(read_parts(out)) == 2


def test_two_items_with_one_key(out, log):
    with pytest.raises(InputError, match="same key"):
        run_items(make_items(2) + make_items(1), Work(log), out)


def test_progress_counts_what_was_there(out, log, capsys):
    run_items(make_items(2), Work(log), out)
    run_items(make_items(4), Work(log), out, progress="powers")
    bar = capsys.readouterr().err
    assert "powers" in bar and "2/4" in bar and "4/4" in bar


# --- Ray --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, error",
    [
        ("127.0.0.1:1", MachineError),
        ("no-such-host.invalid:6379", MachineError),
        ("127.0.0.1", InputError),
        ("ray://127.0.0.1:10001", InputError),
    ],
)
def test_unreachable_address_is_told_at_once(out, log, address, error):
    with pytest.raises(error, match="e.g. 10.0.0.5:6379"):
        run_items(make_items(1), Work(log), out, engine="ray", address=address)
    assert not out.exists()


def test_address_needs_ray():
    with pytest.raises(InputError, match="engine='ray'"):
        check_engine("local", "10.0.0.5:6379")


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'llama_dialogue\[ray\]'"):
        check_engine("ray")


@pytest.fixture(scope="module")
def two_workers():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    for patience in (2, 1, 0):  # on a busy machine Ray itself gives up after 30 seconds
        try:
            own = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 2**27}
            session = ray.init("local", num_cpus=2, **own)
            break
        except Exception as error:
            ray.shutdown()
            if not patience or "timed out during startup" not in str(error):
                raise
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    yield session.address_info["gcs_address"]
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def test_ray_survives_the_death_of_a_worker(out, log, two_workers):
    summary = run_items(make_items(4), Work(log, dies_at=1), out, engine="ray")
    assert summary.computed == 4 and sorted(begun(log)) == [0, 1, 1, 2, 3]
    assert read_parts(out)["number"].tolist() == all_rows(4)


def test_ray_gives_up_on_a_worker_that_always_dies(out, log, two_workers, monkeypatch):
    monkeypatch.setattr(grid, "_RETRIES", 0)
    with pytest.raises(MachineError, match="its worker died 1 times"):
        run_items(make_items(2), Work(log, dies_at=1), out, engine="ray")
    assert run_items(make_items(2), Work(log), out).total == 2 and len(read_parts(out)) == 4


ON_A_CLUSTER = """
import sys
import pandas as pd
from llama_dialogue.core.grid import WorkItem, read_parts, run_items
items = [WorkItem({}, i, 0, f"{i:024d}") for i in range(3)]
work = lambda item: pd.DataFrame({"number": [item.shard]})
print(run_items(items, work, sys.argv[1], engine="ray", address=sys.argv[2]).computed)
print(read_parts(sys.argv[1])["number"].tolist())
"""


def test_a_cluster_by_its_address(out, two_workers):
    command = [sys.executable, "-c", ON_A_CLUSTER, str(out), two_workers]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["3", "[0, 1, 2]"], done.stderr


def test_ray_hands_an_input_error_back(out, two_workers):
    def wrong(item):
        from llama_dialogue.core.errors import InputError

        raise InputError("layers=99: need less")

    with pytest.raises(InputError) as caught:
        run_items(make_items(1), wrong, out, engine="ray")
    assert str(caught.value) == "layers=99: need less"


# --- the perturbation grid --------------------------------------------------------------------------------------

CELLS = (
    {"method": ["none", "prompt"]},
    {"method": "pplm", "layers": ["lower", "upper"], "step_size": 0.5, "num_iterations": [1, 2]},
    {"method": "best_of_n", "best_of": 2},
)


def make_config(**values):
    return GridConfig(
        **{
            "name": "tiny",
            "cells": CELLS,
            "steering": {"max_new_tokens": 4},
            "model": "tiny-llama-random",
            "dtype": "fp64",
            "n": 5,
            "shard_size": 2,
            "targets": "reference",
        }
        | values
    )


@pytest.fixture(scope="module")
def head():
    generator = torch.Generator().manual_seed(5)
    return AttributeHead(torch.randn(4, 64, generator=generator), torch.zeros(4), ACTS)


@pytest.fixture(scope="module")
def exact(head, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact")
    run_grid(make_config(), out, progress=False, head=head)
    return out


def same(first, second, ignore=("seconds",)):
    """Compare rows, whatever their order."""
    names = ["cell", "dialogue_id", "act", "seed"]
    first, second = (
        rows.drop(columns=list(ignore)).sort_values(names).reset_index(drop=True) for rows in (first, second)
    )
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_columns_and_rows(exact):
    rows = read_parts(exact)
    assert list(rows) == [
        *(
            "cell",
            "dialogue_id",
            "act",
            "seed",
            "reply",
            "token_ids",
            "stopped",
            "failed",
            "seconds",
            "forward_equivalents",
        )
    ]
    assert (rows.forward_equivalents > rows.token_ids.map(len)).all()  # the prompt counts too
    assert len(rows) == 7 * 5 and rows.token_ids.map(lambda ids: str(ids.dtype)).eq("int32").all()
    cells = json.loads((exact / "cells.json").read_text())
    assert list(cells) == list(dict.fromkeys(rows.cell))
    assert cells["pplm layers=upper step_size=0.5 num_iterations=2"]["num_iterations"] == 2
    plain = rows[rows.cell == "none"].set_index("dialogue_id").token_ids
    moved = rows[rows.cell.str.startswith("pplm")]
    assert any(list(ids) != list(plain[d]) for d, ids in zip(moved.dialogue_id, moved.token_ids, strict=True))


def test_order_of_cells_does_not_matter(exact, head, tmp_path):
    run_grid(make_config(cells=CELLS[::-1]), tmp_path, progress=False, head=head)
    same(read_parts(exact), read_parts(tmp_path))


def test_ray_gives_the_same_rows_in_float64(exact, head, tmp_path, two_workers):
    summary = run_grid(make_config(), tmp_path, engine="ray", progress=False, head=head)
    assert summary.computed == 7 * 3
    same(read_parts(exact), read_parts(tmp_path))
    assert run_grid(make_config(), tmp_path, progress=False, head=head).found == 7 * 3, "the same keys"


def test_float32_gives_the_same_tokens_whatever_the_shards(head, tmp_path):
    options = {"dtype": "fp32", "cells": CELLS[:2]}
    for size in (2, 5):
        run_grid(make_config(shard_size=size, **options), tmp_path / str(size), progress=False, head=head)
    assert differing_share(read_parts(tmp_path / "2"), read_parts(tmp_path / "5")) == 0


def test_all_targets_and_seeds(head, tmp_path):
    config = make_config(cells=({"method": "none"},), targets="all", seeds=(0, 1), n=3)
    run_grid(config, tmp_path, progress=False)
    rows = read_parts(tmp_path)
    assert (
        len(rows) == 3 * 4 * 2
        and rows.groupby(["dialogue_id", "act"]).seed.apply(list).map([0, 1].__eq__).all()
    )
    assert len({tuple(ids) for ids in rows.token_ids}) == len(rows), "every row has its own luck"


def test_what_the_key_depends_on(head):
    chat = tiny_chat_model(dtype=torch.float64)

    def keys(config=None, **parts):
        plan = plan_grid(config or make_config(), **({"chat": chat, "head": head} | parts))
        return {(item.cell["id"], item.shard): item.key for item in plan.items}

    base = keys()
    other_head = AttributeHead(head.weight + 1, head.bias, ACTS)
    changed = {cell for (cell, shard), key in keys(head=other_head).items() if key != base[cell, shard]}
    assert changed == {cell for cell, _ in base if cell.startswith(("pplm", "best_of_n"))}
    for other in (
        keys(chat=replace(chat, sha256="0" * 64)),
        keys(chat=tiny_chat_model(dtype=torch.float32)),
        keys(make_config(seeds=(1,))),
        keys(make_config(context_seed=1)),
        keys(make_config(targets="all")),
        keys(make_config(steering={"max_new_tokens": 5})),
    ):
        assert not set(other.values()) & set(base.values())
    assert keys(make_config(name="renamed", judge="runs/judge")) == base


RUN = """
import sys, torch
from pathlib import Path
from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.compare.grid import GridConfig, run_grid
config, head, out = sys.argv[1:]
run_grid(GridConfig.from_yaml(config), out, progress=False, head=AttributeHead.from_pretrained(head))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_kill_a_real_run(exact, head, tmp_path, kill, hears_ctrl_c):
    config, out = tmp_path / "grid.yaml", tmp_path / "out"
    make_config().to_yaml(config)
    head.save_pretrained(tmp_path / "head")
    command = [sys.executable, "-c", RUN, str(config), str(tmp_path / "head"), str(out)]
    victim = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(list((out / "parts").glob("*.parquet"))) < 2:
        assert victim.poll() is None, victim.stderr.read()
        time.sleep(0.005)
    victim.send_signal(kill)
    told = victim.communicate()[1]
    there = len(list((out / "parts").glob("*.parquet")))
    if kill == signal.SIGINT:
        assert f"interrupted: {there} of 21 parts are in {out}" in told
    summary = run_grid(make_config(), out, progress=False, head=head)
    assert victim.returncode != 0 and (summary.found, summary.damaged) == (there, ())
    same(read_parts(exact), read_parts(out))


def test_the_seed_s_grid():
    config = GridConfig.from_yaml(checkout_dir() / "configs" / "perturb" / "original-grid.yaml")
    for num_layers, ranges in (
        (30, {"all", "lower", "middle", "upper"}),
        (32, {(0, 32), (0, 11), (11, 22), (21, 32)}),
    ):
        cells = expand_cells(config, num_layers)
        steered = [SteeringConfig.from_dict(c["options"]) for c in cells if c["method"] == "pplm"]
        assert len(cells) == len({c["id"] for c in cells}) == 169 and {s.layers for s in steered} == ranges
        assert len({s.step_size for s in steered}) == 14 and {s.num_iterations for s in steered} == {3, 5, 7}


def test_cells_are_not_repeated():
    cells = (
        {"method": "pplm", "layers": ["upper", 32]},
        {"step_size": 0.2, "method": "pplm"},
        {"method": "none"},
    )
    assert [c["id"] for c in expand_cells(make_config(cells=cells, steering={}))] == [
        "pplm layers=upper",
        "none",
    ]


def test_config_survives_yaml(tmp_path):
    config = make_config(cells=({"method": "pplm", "layers": [[1, 3], "all"]},))
    config.to_yaml(tmp_path / "grid.yaml")
    again = GridConfig.from_yaml(tmp_path / "grid.yaml")
    assert again == config and [c["id"] for c in expand_cells(again)] == [
        "pplm layers=1-3",
        "pplm layers=all",
    ]


@pytest.mark.parametrize(
    "values, told",
    [
        ({"cells": ()}, "at least one group"),
        ({"cells": ({"layers": "upper"},)}, "has no method"),
        ({"cells": ({"method": "pplmm"},)}, "'pplm'"),
        ({"cells": ({"method": "pplm", "layers": "uper"},)}, "'upper'"),
        ({"cells": ({"method": "pplm", "layers": [1, 3]},)}, "[[20, 30]]"),
        ({"cells": ({"method": "pplm", "step_size": [0.1, -1]},)}, "step_size=-1"),
        ({"steering": {"top_kk": 3}}, "'top_k'"),
        ({"targets": "both"}, "'reference'"),
        ({"seeds": (1, 1)}, "each once"),
        ({"shard_size": 0}, "at least 1"),
    ],
)
def test_bad_config(values, told):
    with pytest.raises(InputError) as caught:
        make_config(**values)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_bad_requests_leave_nothing_behind(head, tmp_path):
    outside = make_config(cells=({"method": "pplm", "layers": [[2, 5]]},))
    wide = AttributeHead(torch.randn(4, 32), torch.zeros(4), ACTS)
    for config, given, told in (
        (outside, head, "0 <= start < stop <= 4"),
        (make_config(), wide, "width"),
        (make_config(), AttributeHead(head.weight, head.bias, list("abcd")), "classes"),
        (make_config(n=10**6), head, "need at most that"),
    ):
        with pytest.raises(InputError, match=told):
            run_grid(config, tmp_path / "out", progress=False, head=given)
    assert not list((tmp_path / "out").rglob("*"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file stands"):
        run_grid(make_config(), tmp_path / "file" / "out", progress=False, head=head)
    with pytest.raises(InputError, match="leave chat out"):
        run_grid(make_config(), tmp_path / "out", engine="ray", chat=tiny_chat_model(), head=head)


def test_unlabelled_replies_cannot_be_targets(head, judge, tmp_path):
    bare = [replace(d, turns=tuple(replace(t, act=None) for t in d.turns)) for d in load_corpus()]
    data = str(write_jsonl(bare, tmp_path / "bare.jsonl"))
    with pytest.raises(InputError, match="has no act"):
        run_grid(make_config(data=data), tmp_path / "out", progress=False, head=head)
    plain = make_config(data=data, targets="all", cells=({"method": "none"},), n=2)
    run_grid(plain, tmp_path / "out", progress=False)
    scores = score_grid(tmp_path / "out", judge=judge, progress=False)
    assert set(scores.cell) == {"none"} and len(scores) == 2 * 4, "no act, no human row"


# --- scores -----------------------------------------------------------------------------------------------------


def make_judge(seed):
    _, words = load_encoder()
    torch.manual_seed(seed)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = BertModel(BertConfig(vocab_size=len(words), **size), add_pooling_layer=False)
    return Judge(JudgeNetwork(encoder, 4, JudgeConfig()), words, JudgeConfig())


@pytest.fixture(scope="module")
def judge():
    return make_judge(0)


def test_scores(exact, judge):
    rows, scores = read_parts(exact), score_grid(exact, judge=judge, progress=False)
    assert list(scores) == [
        *(
            "cell",
            "dialogue_id",
            "act",
            "seed",
            "reply",
            "stopped",
            "failed",
            "seconds",
            "forward_equivalents",
        ),
        *("judged", "probability", "question_mark", "num_tokens", "nll", "other_nll"),
        *("similarity", "similarity_floor", "repetition", "ai_talk", "meteor_stem", "rouge_l", "overlap"),
    ]
    human, made = scores[scores.cell == "human"], scores[scores.cell != "human"].reset_index(drop=True)
    assert len(human) == 5 and human.dialogue_id.is_unique and set(human.reply) == {""}
    examples = {e.dialogue_id: e for e in grid_examples(make_config(), load_corpus())}
    assert [examples[i].reply.act for i in human.dialogue_id] == human.act.tolist()
    assert made.reply.equals(rows.reply) and made.num_tokens.tolist() == rows.token_ids.map(len).tolist()
    chat = tiny_chat_model()
    prompts = [build_prompt(chat.tokenizer, examples[i].context) for i in rows.dialogue_id]
    nll, _ = reply_nll(chat.model, chat.tokenizer, prompts, rows.token_ids.tolist())
    assert abs(made.nll - nll).max() < 1e-3
    pd.testing.assert_frame_equal(pd.read_parquet(exact / "scores.parquet"), scores)
    assert human.meteor_stem.isna().all() and made.drop(columns="overlap").notna().all(axis=None)
    assert (
        made.groupby("dialogue_id").forward_equivalents.min().gt(0).all()
        and not human.forward_equivalents.any()
    )
    log_probs = judge.predict([examples[i] for i in human.dialogue_id])
    assert human.judged.tolist() == [ACTS[i] for i in log_probs.argmax(-1).tolist()]


def test_no_corpus_text_is_written(exact, judge):
    score_grid(exact, judge=judge, progress=False)
    texts = {e.reply.text for e in grid_examples(make_config(), load_corpus())}
    for path in exact.rglob("*.parquet"):
        assert not texts & set(pd.read_parquet(path).get("reply", []))


def test_scores_are_kept_until_the_judge_changes(exact, judge, monkeypatch, tmp_path):
    shutil.copytree(exact, tmp_path / "grid")
    first = score_grid(tmp_path / "grid", judge=judge, progress=False)
    monkeypatch.setattr(Judge, "predict", lambda *_: pytest.fail("scored twice"))
    pd.testing.assert_frame_equal(score_grid(tmp_path / "grid", judge=judge, progress=False), first)
    monkeypatch.undo()
    other = make_judge(1).save_pretrained(tmp_path / "judge")
    second = score_grid(tmp_path / "grid", judge=other, progress=False)
    assert (second.probability != first.probability).any() and second.nll.equals(first.nll)


def test_scores_of_an_unfinished_grid(exact, judge, tmp_path):
    shutil.copytree(exact, tmp_path / "grid")
    for path in (tmp_path / "grid" / "parts").glob("[0-7]*.parquet"):
        path.unlink()
    with pytest.raises(InputError, match="parts are missing"):
        score_grid(tmp_path / "grid", judge=judge, progress=False)
    some = score_grid(tmp_path / "grid", judge=judge, progress=False, partial=True)
    assert 5 < len(some) < 7 * 5 + 5


def test_a_second_model_and_a_record(exact, judge, tmp_path):
    shutil.copytree(exact, tmp_path / "grid")
    plain = score_grid(tmp_path / "grid", judge=judge, progress=False)
    second = tiny_chat_model("gemma")
    scores = score_grid(tmp_path / "grid", judge=judge, progress=False, second=second, records=tmp_path)
    assert "second_nll" not in plain and scores.second_nll.gt(0).all() and scores.second_words.ge(1).all()
    pd.testing.assert_frame_equal(scores[list(plain)], plain)
    record = RunRecord.load(tmp_path / "perturb" / f"{make_config().name}.json")
    rows, metrics = load_rows(tmp_path / "perturb" / record.rows), record.metrics
    about = grid.load_manifest(exact)["about"]
    assert (record.model, record.data, record.config) == (about["model"], about["data"], about["config"])
    assert metrics["second_model"]["sha256"] == second.sha256 and metrics["human_ceiling"].n == 5
    assert metrics["grid"]["rows"] == len(scores) - 5 and metrics["inputs"] == about["inputs"]
    assert set(metrics["cells"]) == set(rows.cell) - {HUMAN} and list(rows) == list(scores)
    assert rows.reply.equals(scores.reply) and (rows.nll / scores.nll - 1).abs().max() < 1e-3


def test_parts_of_an_older_version_are_refused(exact, judge, tmp_path):
    shutil.copytree(exact, tmp_path / "grid")
    key = grid.load_manifest(tmp_path / "grid")["parts"][0]
    rows = grid.read_part(tmp_path / "grid", key).drop(columns="forward_equivalents")
    grid.save_part(rows, tmp_path / "grid", key)
    with pytest.raises(InputError, match="run the grid again"):
        score_grid(tmp_path / "grid", judge=judge, progress=False)


def test_a_reply_without_tokens_is_scored(exact, judge, tmp_path):
    shutil.copytree(exact, tmp_path / "grid")
    key = grid.load_manifest(tmp_path / "grid")["parts"][0]
    rows = grid.read_part(tmp_path / "grid", key)
    rows.at[0, "token_ids"], rows.at[0, "reply"], rows.at[0, "failed"] = [], "", True
    grid.save_part(rows, tmp_path / "grid", key)
    scores = score_grid(tmp_path / "grid", judge=judge, progress=False)
    failed = scores[scores.failed].iloc[0]
    assert failed.num_tokens == 0 and pd.isna(failed.nll) and scores.nll.isna().sum() == 1


def test_scores_need_the_same_data_and_model(exact, judge, tmp_path):
    fewer = write_jsonl(load_corpus().dialogues[:200], tmp_path / "fewer.jsonl")
    with pytest.raises(InputError, match="not the data"):
        score_grid(exact, data=fewer, judge=judge, progress=False)
    copy = write_jsonl(load_corpus().dialogues, tmp_path / "copy.jsonl")
    assert len(score_grid(exact, data=copy, judge=judge, progress=False)) == 7 * 5 + 5
    with pytest.raises(InputError, match="not the one that the grid ran on"):
        score_grid(exact, judge=judge, progress=False, chat=tiny_chat_model("gemma"))
    with pytest.raises(InputError, match="no such file: need the folder of a grid"):
        score_grid(tmp_path / "none", judge=judge)
    emotional = Judge(judge.network, judge.tokenizer, JudgeConfig(target="emotion"))
    with pytest.raises(InputError, match="need one of acts"):
        score_grid(exact, judge=emotional, progress=False)


def test_runs_of_different_grids_cannot_be_compared(exact):
    rows = read_parts(exact)
    with pytest.raises(InputError, match="the same grid"):
        differing_share(rows, rows[rows.cell == "none"])


# --- the report -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(exact, judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored") / "grid"
    shutil.copytree(exact, folder)
    score_grid(folder, judge=judge, progress=False)
    return folder


def break_replies(scores, rows):
    """Make replies as they are when they break before their first token, and the judge happens to be right."""
    scores = scores.copy()
    scores.loc[rows, ["nll", "other_nll"]] = float("nan")
    scores.loc[rows, "num_tokens"] = 0
    scores.loc[rows, "judged"] = scores.loc[rows, "act"]
    return scores


def test_report_has_every_column_of_the_scores(scored):
    scores, cells = report.read_scores(scored)
    table = report.compare_cells(scores, cells)
    for name in (
        *("method", "accuracy", "probability", "precision", "recall", "macro_f1", "share_question"),
        *("perplexity", "median_perplexity", "own_context_wins", "context_gain", "similarity_gain"),
        *("meteor_stem", "rouge_l", "bleu_1", "bleu_2", "nist_2", "nist_4", "distinct_1", "distinct_3"),
        *("entropy_2", "entropy_4", "repetition", "ai_talk", "tokens", "seconds_per_token"),
        *("forward_equivalents_per_token", "failed", "question_mark", "question_judged", "perplexity_ratio"),
    ):
        assert table[name].notna()["none"], name
    assert list(table.index) == [*cells, "human"] and table.verdict.notna().sum() == len(cells) - 1
    human = table.loc["human"]
    assert human[["distinct_1", "bleu_1", "seconds_per_token", "gain"]].isna().all()
    assert human[["accuracy", "context_gain", "tokens", "repetition"]].notna().all()
    rows = scores[scores.cell == "none"]
    slow = summed_reference_scores(np.stack(rows.overlap), list(rows.dialogue_id))
    assert all(abs(table.loc["none", name] - score.value) < 1e-9 for name, score in slow.items())


def test_replies_that_broke_count_as_misses(scored):
    scores, cells = report.read_scores(scored)
    cell = "pplm layers=upper step_size=0.5 num_iterations=2"
    lost = scores.index[scores.cell == cell][:2]
    whole = report.compare_cells(break_replies(scores, []), cells).loc[cell]
    row = report.compare_cells(break_replies(scores, lost), cells).loc[cell]
    rest = report.cell_scores(scores[scores.cell == cell].drop(lost))
    hits = (scores.judged == scores.act)[(scores.cell == cell) & ~scores.index.isin(lost)].sum()
    assert (whole.failed, row.failed) == (0, 2) and row.accuracy.value == hits / 5 and row.accuracy.n == 5
    assert row.perplexity == rest["perplexity"] and row.context_gain == rest["context_gain"]
    assert abs(sum(row[f"share_{act}"] for act in ACTS) - 3 / 5) < 1e-9
    acts = report.act_table(break_replies(scores, lost), cells)
    own = acts[acts.cell == cell]
    assert own.n.sum() == 5 and abs(own.share.sum() - 3 / 5) < 1e-9


def test_a_cell_that_broke_altogether_is_reported_and_never_best(scored, tmp_path):
    scores, cells = report.read_scores(scored)
    cell = "best_of_n best_of=2"
    scores = break_replies(scores, scores.index[scores.cell == cell])
    save_rows(scores, tmp_path / "scores.parquet")
    shutil.copy(scored / "cells.json", tmp_path)
    path, table = report.write_report(tmp_path)
    assert table.accuracy[cell].value == 0 and table.failed[cell] == 5
    assert pd.isna(table.perplexity_ratio[cell]) and cell not in report.pareto_front(table)
    assert cell not in report.best_by_method(table, 1e9).cell.tolist() and cell in path.read_text()
    for name in (
        "report.csv",
        "report_acts.csv",
        "report__control.png",
        "report__cost.png",
        "report__heat.png",
    ):
        assert (tmp_path / name).stat().st_size, name


def test_best_of_each_method_within_a_budget():
    def row(method, accuracy, ratio, layers="upper"):
        found = {"method": method, "layers": layers, "perplexity_ratio": ratio}
        return found | {"accuracy": Interval(accuracy, 0.0, 1.0, 8)}

    table = pd.DataFrame.from_dict(
        {
            "none": row("none", 0.9, 1.0),
            "a": row("pplm", 0.4, 1.2),
            "b": row("pplm", 0.8, 1.4),
            "c": row("pplm", 0.5, 1.1, [2, 4]),
            "d": row("vector", 0.6, 1.25),
            "e": row("guided", 0.7, 1.6),
            "human": row("human", 1.0, 1.0),
        },
        orient="index",
    ).rename_axis("cell")
    assert report.best_by_method(table, 1.25).cell.to_dict() == {"vector": "d", "pplm": "c"}
    assert report.best_by_method(table, 1.5).cell.to_dict() == {"pplm": "b", "vector": "d"}
    split = report.best_by_method(table, 1.25, by_layers=True)
    assert split.cell.to_dict() == {"vector": "d", "pplm 2-4": "c", "pplm upper": "a"}
    assert report.best_within(table, 1.25) == "d" and report.best_within(table, 1.05) is None


def test_replies_cannot_tear_the_report(scored, tmp_path):
    scores, cells = report.read_scores(scored)
    scores.loc[scores.cell == "none", "reply"] = "one | two\nthree"
    save_rows(scores, tmp_path / "scores.parquet")
    shutil.copy(scored / "cells.json", tmp_path)
    text = report.write_report(tmp_path)[0].read_text()
    lines = text[text.index("## Replies") :].splitlines()[2:]
    assert r"one \| two three" in lines[-1] and all(line.startswith("|") for line in lines)
    save_rows(scores.drop(columns="other_nll"), tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="no column 'other_nll'"):
        report.write_report(tmp_path)
