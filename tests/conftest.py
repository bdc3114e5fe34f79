import functools
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the hub
beside = Path(__file__).resolve().parents[2] / "shared" / "data"  # corpora that lie beside the checkout
if beside.is_dir() and not os.environ.get("LLAMA_DIALOGUE_DATA"):
    os.environ["LLAMA_DIALOGUE_DATA"] = str(beside)


@pytest.fixture(scope="session")
def two_workers():
    """Ray with two workers, started once; its address."""
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
    yield session.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_chat():
    """Tiny chat models by family and dtype (float64 unless given), each built once; no test may change one."""
    import torch

    from llama_dialogue.core.models import tiny_chat_model

    @functools.cache
    def get(family="llama", dtype=torch.float64):
        return tiny_chat_model(family, dtype=dtype)

    return get
