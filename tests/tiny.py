"""What steers and judges a tiny random model: made in milliseconds, the same in every test."""

import torch
from transformers import BertConfig, BertModel

from llama_dialogue.attribute.configs import JudgeConfig
from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.attribute.judge import Judge, JudgeNetwork
from llama_dialogue.core.models import load_encoder
from llama_dialogue.core.targets import ACTS, get_target


def make_head(seed=5, classes=ACTS, width=64):
    weight = torch.randn(len(classes), width, generator=torch.Generator().manual_seed(seed))
    return AttributeHead(weight, torch.zeros(len(classes)), classes)


def make_judge(seed=0, target="act"):
    _, words = load_encoder()
    torch.manual_seed(seed)
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    encoder = BertModel(BertConfig(vocab_size=len(words), **size), add_pooling_layer=False)
    network = JudgeNetwork(encoder, len(get_target(target).classes), JudgeConfig())
    return Judge(network, words, JudgeConfig(), target=target)
