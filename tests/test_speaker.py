"""The model that talks like a person: one adapter, a name in the registry, heads of its own, few bytes."""

import pytest
import torch
from safetensors.torch import load_file

from llama_dialogue.app.chat import ChatConfig
from llama_dialogue.app.reply import ReplyConfig
from llama_dialogue.attribute.defaults import _shipped_head
from llama_dialogue.compare.cells import DemoConfig, GridConfig
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.models import get_model, load_chat_model, load_tokenizer
from llama_dialogue.core.paths import checkout_dir, models_dir, sha256_file
from llama_dialogue.core.records import RunRecord, results_dir
from llama_dialogue.core.registry import SPEAKER
from llama_dialogue.core.targets import ACT, EMOTION
from llama_dialogue.sft.adapters import adapter_sha256, load_adapter
from llama_dialogue.sft.configs import SFTTrainingConfig

FOLDER = models_dir() / "speaker"
PROMPT = "<|im_start|>user\nRoom service. What can I do for you?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def speaker():
    return load_chat_model(SPEAKER, "fp32", "cpu")


def logits(chat):
    ids = torch.tensor([chat.tokenizer(PROMPT, add_special_tokens=False).input_ids])
    return chat.model(ids).logits


def test_it_is_its_base_with_the_shipped_adapter_in_float32(speaker):
    named = load_chat_model(dtype="fp32", device="cpu", adapter="speaker")
    assert speaker.name == SPEAKER and speaker.sha256 == named.sha256
    assert load_chat_model(SPEAKER, "fp64", "cpu").dtype == torch.float64
    beside = load_adapter(FOLDER, load_chat_model("smollm2-135m", "fp32", "cpu")).chat
    torch.testing.assert_close(logits(speaker), logits(beside), atol=2e-3, rtol=0)
    assert (logits(speaker) - logits(load_chat_model("smollm2-135m", "fp32", "cpu"))).abs().max() > 1


def test_its_files_are_few_and_whole():
    config, record = (
        SFTTrainingConfig.from_yaml(FOLDER / "config.yaml"),
        RunRecord.load(FOLDER / "record.json"),
    )
    told = SFTTrainingConfig.from_yaml(checkout_dir() / "configs" / "sft" / "speaker.yaml")
    assert config == told == SFTTrainingConfig.from_dict(record.config)
    kept = RunRecord.load(results_dir() / "sft" / "speaker.json")
    assert kept.details["artefact"] == record.details["artefact"]
    weights = load_file(FOLDER / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (FOLDER / "adapter_model.safetensors").stat().st_size < 5.5e6 and (FOLDER / "README.md").is_file()
    assert record.inputs["data"]["name"] == "sample"  # it learned from nothing else
    assert len(adapter_sha256(FOLDER)) == len(sha256_file(FOLDER / "adapter.json")) == 64


def test_heads_are_shipped_for_it(speaker):
    for target in (ACT, EMOTION):
        head = _shipped_head(speaker, target, "speaker")
        assert head is not None and head.classes == target.classes


def test_who_speaks_by_default():
    assert ReplyConfig().model == DemoConfig().model == SPEAKER and ChatConfig().model is None
    assert GridConfig().model == "smollm2-135m"
    assert ReplyConfig().decoding == DemoConfig().decoding
    assert ReplyConfig().decoding == ChatConfig().decoding.override(["max_new_tokens=40"])


def test_places_of_it():
    assert get_model(SPEAKER) == get_model("smollm2-135m")
    assert load_tokenizer(SPEAKER).get_vocab() == load_tokenizer("smollm2-135m").get_vocab()
    with pytest.raises(InputError, match="merged in float32"):
        load_chat_model(SPEAKER, quantization="nf4")
    with pytest.raises(InputError, match="a shipped one, e.g. speaker"):
        load_chat_model(adapter="speeker")
