import functools
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the hub
beside = Path(__file__).resolve().parents[2] / "shared" / "data"  # corpora that lie beside the checkout
if beside.is_dir() and not os.environ.get("LLAMA_DIALOGUE_DATA"):
    os.environ["LLAMA_DIALOGUE_DATA"] = str(beside)


@pytest.fixture
def log(tmp_path):
    """Where a test's work writes down what it did."""
    return tmp_path / "log"


@pytest.fixture
def out(tmp_path):
    """The folder of a grid."""
    return tmp_path / "grid"


@pytest.fixture(scope="session")
def tiny_chat():
    """Tiny chat models by family and dtype (float64 unless given), each built once; no test may change one."""
    import torch

    from llama_dialogue.core.models import tiny_chat_model

    @functools.cache
    def get(family="llama", dtype=torch.float64):
        return tiny_chat_model(family, dtype=dtype)

    return get
