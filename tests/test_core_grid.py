"""The grid: kills, damage, full disks and second helpers cost at most the shards under way, and never a wrong row."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from llama_dialogue.core import grid
from llama_dialogue.core.errors import InputError, MachineError
from llama_dialogue.core.grid import WorkItem, check_engine, item_key, part_path, read_parts, run_items

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
