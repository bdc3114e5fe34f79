"""Ray does what one process does, survives its workers, and is started once for all of this."""

import os
import subprocess
import sys

import pytest
import test_core_grid
from test_compare import make_config, same
from test_core_grid import Work, all_rows, begun, make_items
from tiny import make_head

from llama_dialogue.compare.grid import run_grid
from llama_dialogue.compare.methods import SteeringInputs
from llama_dialogue.core import grid
from llama_dialogue.core.errors import InputError, MachineError
from llama_dialogue.core.grid import read_parts, run_items


@pytest.fixture(scope="module")
def address():
    """Ray with two workers; they cannot import a test, so they get what it defines by value."""
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
    tests = [test_core_grid, sys.modules[__name__]]
    for module in tests:
        ray.cloudpickle.register_pickle_by_value(module)
    yield session.address_info["gcs_address"]
    for module in tests:
        ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()


def test_ray_survives_the_death_of_a_worker(out, log, address):
    summary = run_items(make_items(4), Work(log, dies_at=1), out, engine="ray")
    assert summary.computed == 4 and sorted(begun(log)) == [0, 1, 1, 2, 3]
    assert read_parts(out)["number"].tolist() == all_rows(4)


def test_ray_gives_up_on_a_worker_that_always_dies(out, log, address, monkeypatch):
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


def test_a_cluster_by_its_address(out, address):
    command = [sys.executable, "-c", ON_A_CLUSTER, str(out), address]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["3", "[0, 1, 2]"], done.stderr


def test_ray_hands_an_input_error_back(out, address):
    def wrong(item):
        from llama_dialogue.core.errors import InputError

        raise InputError("layers=99: need less")

    with pytest.raises(InputError) as caught:
        run_items(make_items(1), wrong, out, engine="ray")
    assert str(caught.value) == "layers=99: need less"


def test_ray_gives_the_same_rows_in_float64(tmp_path, address):
    config, inputs, ours, rays = (
        make_config(),
        SteeringInputs(head=make_head()),
        tmp_path / "ours",
        tmp_path / "ray",
    )
    run_grid(config, ours, progress=False, inputs=inputs)
    summary = run_grid(config, rays, engine="ray", progress=False, inputs=inputs)
    assert summary.computed == 7 * 2
    same(read_parts(ours), read_parts(rays))
    assert run_grid(config, rays, progress=False, inputs=inputs).found == 7 * 2, "the same keys"
