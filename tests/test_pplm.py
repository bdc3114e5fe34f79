"""Batched PPLM equals the plain reference: the same tokens, perturbations within 1e-9, in float64 on tiny models."""

import gc
from types import SimpleNamespace

import pytest
import torch

from llama_dialogue.core.errors import InputError
from llama_dialogue.core.generation import GenerationConfig, generate
from llama_dialogue.core.models import byte_tokenizer, tiny_chat_model
from llama_dialogue.perturb.attributes import BagOfWords, Weighted
from llama_dialogue.perturb.pplm import generate_pplm
from llama_dialogue.perturb.pplm_config import PPLMConfig
from llama_dialogue.perturb.reference import reference_pplm

FAMILIES = ("llama", "mistral", "qwen2", "gemma")
TEXTS = [
    "Why?",
    "The kettle is on the stove.",
    "No.",
    "Who on earth painted the gate pink, and when?",
    "",
    "Wait!",
    "Mm",
]
PROMPTS = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXTS]
CASES = {
    "all": dict(layers="all"),
    "lower": dict(layers="lower", num_iterations=1),
    "middle": dict(layers="middle", num_iterations=2),
    "upper": dict(layers="upper", num_iterations=5),
    "one layer": dict(layers=(1, 2), sample=False),
    "horizon": dict(layers="upper", horizon_length=3),
    "window": dict(layers="all", window_length=5),
    "decay": dict(layers="middle", window_length=4, decay=True),
    "penalty": dict(layers="upper", repetition_penalty=1.3, sample=False),
    "fusion": dict(layers="all", gm_scale=0.5, kl_scale=0.5, top_k=0, top_p=0.9, temperature=0.7),
    "long window": dict(layers="upper", window_length=500, decay=True),
    "first layer": dict(layers=(0, 1), horizon_length=2, num_iterations=4),
    "gamma": dict(layers="all", gamma=0.5, step_size=0.1),
}


@pytest.fixture(params=FAMILIES)
def chat(request, tiny_chat):
    return tiny_chat(request.param)


@pytest.fixture(scope="module")
def head():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    return SimpleNamespace(weight=weight, bias=torch.zeros(4), classes=["a", "b", "c", "d"], layer=None)


def assert_equal_to_reference(chat, head, prompts, config, labels=None):
    labels, seeds = labels or [i % 4 for i in range(len(prompts))], [100 + i for i in range(len(prompts))]
    out = generate_pplm(
        chat.model, chat.tokenizer, prompts, labels, head, config, seeds=seeds, return_deltas=True
    )
    for row, prompt in enumerate(prompts):
        plain = reference_pplm(
            chat.model, chat.tokenizer, prompt, labels[row], head, config, seeds[row], True
        )
        assert out.token_ids[row] == plain.token_ids[0]
        for mine, dense in zip(out.deltas[row], plain.deltas[0], strict=True):
            assert (mine - dense).abs().max() < 1e-9
        torch.testing.assert_close(
            torch.tensor(out.losses[row]), torch.tensor(plain.losses[0]), rtol=1e-9, atol=1e-9
        )
    return out


@pytest.mark.parametrize("case", CASES)
def test_equals_reference(chat, head, case):
    number = list(CASES).index(case)
    rows = 1 + (number + FAMILIES.index(chat.name.split("-")[1])) % 3
    start = number % (len(PROMPTS) - rows + 1)
    config = PPLMConfig(**{"step_size": 0.3, "max_new_tokens": 3} | CASES[case])
    assert_equal_to_reference(chat, head, PROMPTS[start : start + rows], config)


@pytest.mark.parametrize("rows", range(1, 8))
def test_batch_sizes(tiny_chat, head, rows):
    chat = tiny_chat(FAMILIES[rows % 4])
    assert_equal_to_reference(
        chat, head, PROMPTS[:rows], PPLMConfig(layers="upper", step_size=0.5, max_new_tokens=2)
    )


def test_rows_that_end_early_leave(head):
    chat = tiny_chat_model("qwen2", dtype=torch.float64)
    chat.model.generation_config.eos_token_id = list(range(0, 260, 3))
    out = assert_equal_to_reference(
        chat, head, PROMPTS[:5], PPLMConfig(layers="middle", step_size=0.3, max_new_tokens=6, top_k=0)
    )
    lengths = {len(ids) for ids in out.token_ids}
    assert any(out.stopped) and len(lengths) > 1


@pytest.mark.parametrize("prompts", [["A", "Come in, it's open."], ["A", "B"]])
def test_prompt_of_one_token(head, prompts, tiny_chat):
    chat = tiny_chat("gemma")
    config = PPLMConfig(layers="all", step_size=0.3, max_new_tokens=3)
    labels = [1, 2]
    out = generate_pplm(chat.model, chat.tokenizer, prompts, labels, head, config, seeds=[0, 1])
    for row in range(2):
        plain = reference_pplm(chat.model, chat.tokenizer, prompts[row], labels[row], head, config, row)
        assert out.token_ids[row] == plain.token_ids[0]


def test_same_prompt_for_every_target(head, tiny_chat):
    chat = tiny_chat("mistral")
    assert_equal_to_reference(
        chat, head, [PROMPTS[1]] * 4, PPLMConfig(layers="all", step_size=0.5, max_new_tokens=2)
    )


def test_float32_gives_the_tokens_of_the_reference(head, tiny_chat):
    chat = tiny_chat("llama", torch.float32)
    config = PPLMConfig(layers="upper", step_size=0.3, max_new_tokens=4)
    out = generate_pplm(chat.model, chat.tokenizer, PROMPTS[:5], [0, 1, 2, 3, 0], head, config)
    for row, prompt in enumerate(PROMPTS[:5]):
        plain = reference_pplm(chat.model, chat.tokenizer, prompt, row % 4, head, config, row)
        assert out.token_ids[row] == plain.token_ids[0]


def test_perturbations_are_float32_under_a_bfloat16_model(head):
    chat = tiny_chat_model("llama", dtype=torch.bfloat16)
    config = PPLMConfig(layers=(1, 3), step_size=0.01, max_new_tokens=2)
    out = generate_pplm(
        chat.model, chat.tokenizer, PROMPTS[:2], [0, 1], head, config, return_deltas=True, trace=True
    )
    delta = out.deltas[0][0]
    assert delta.dtype == torch.float32 and delta.count_nonzero() > 0.9 * delta.numel()
    assert out.traces[0].gradient_norm.shape == (2, 3, 2)
    assert (delta.flatten(1).norm(dim=1) <= 3 * 0.01 * 1.001).all()
    assert out.losses[1] == out.traces[1].loss.tolist()


def test_a_row_does_not_depend_on_its_neighbours(head, tiny_chat):
    chat = tiny_chat("gemma")
    config = PPLMConfig(layers="upper", step_size=0.3, max_new_tokens=3)

    def run(rows):
        prompts, labels = [PROMPTS[i] for i in rows], [i % 4 for i in rows]
        out = generate_pplm(
            chat.model, chat.tokenizer, prompts, labels, head, config, seeds=[7 + i for i in rows]
        )
        return dict(zip(rows, out.token_ids, strict=True))

    together = run([0, 1, 2, 3, 4])
    assert run([4, 2, 0]) == {i: together[i] for i in (4, 2, 0)}


def test_a_step_of_zero_is_plain_generation(head, tiny_chat):
    chat = tiny_chat("qwen2")
    still = PPLMConfig(layers="all", step_size=0.0, gm_scale=1.0, max_new_tokens=6, repetition_penalty=1.2)
    out = generate_pplm(chat.model, chat.tokenizer, PROMPTS[:4], [0] * 4, head, still, seed=3)
    plain = GenerationConfig(max_new_tokens=6, repetition_penalty=1.2)
    assert out.token_ids == generate(chat.model, chat.tokenizer, PROMPTS[:4], plain, seed=3).token_ids


def test_nothing_stays_in_memory(head, tiny_chat):
    chat = tiny_chat("llama", torch.float32)

    def tensors():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    config = PPLMConfig(layers="all", horizon_length=2, max_new_tokens=2)
    generate_pplm(chat.model, chat.tokenizer, PROMPTS[:2], [0, 1], head, config)
    before = tensors()
    generate_pplm(chat.model, chat.tokenizer, PROMPTS[:2], [0, 1], head, config)
    assert tensors() == before


def test_model_is_given_back_as_it_was(head):
    chat = tiny_chat_model("llama")
    chat.model.requires_grad_(True).train()
    chat.model.lm_head.requires_grad_(False)
    asked = [p.requires_grad for p in chat.model.parameters()]
    ids = torch.tensor([[40, 41, 42]])
    before = chat.model(ids).logits
    generate_pplm(
        chat.model, chat.tokenizer, PROMPTS[:2], [0, 1], head, PPLMConfig(layers="all", max_new_tokens=2)
    )
    assert torch.equal(before, chat.model(ids).logits)
    assert chat.model.training and [p.requires_grad for p in chat.model.parameters()] == asked
    assert all(p.grad is None for p in chat.model.parameters())


def test_a_gradient_that_is_not_finite_stops_its_row_only(head, tiny_chat):
    chat = tiny_chat("llama")
    broken = SimpleNamespace(**vars(head))
    broken.bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])  # class d has no probability at all
    out = generate_pplm(
        chat.model, chat.tokenizer, PROMPTS[:3], [0, 3, 1], broken, PPLMConfig(layers="all", max_new_tokens=3)
    )
    assert out.failed == [False, True, False]
    assert len(out.token_ids[0]) == 3 and out.token_ids[1] == [] and len(out.token_ids[2]) == 3


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(layers=(3, 9)), "need 0 <= start < stop <= 4"),
        (dict(layers="uper"), "upper"),
        (dict(max_new_tokens=5000), "context window"),
    ],
)
def test_refused_before_any_work(head, change, told, tiny_chat):
    chat = tiny_chat("llama", torch.float32)
    with pytest.raises(InputError, match=told):
        generate_pplm(chat.model, chat.tokenizer, PROMPTS[:1], [0], head, PPLMConfig(**change))


def test_wrong_heads_and_labels_are_refused(head, tiny_chat):
    chat = tiny_chat("llama", torch.float32)
    narrow = SimpleNamespace(**vars(head) | {"weight": torch.zeros(4, 32)})
    middle = SimpleNamespace(**vars(head) | {"layer": 2})
    for bad, labels, told in (
        (narrow, [0], "width|shape"),
        (middle, [0], "layer 2"),
        (head, [4], "label 4"),
        (head, ["d"], "label 'd'"),
        (head, [0, 1], "labels"),
    ):
        with pytest.raises(InputError, match=told):
            generate_pplm(chat.model, chat.tokenizer, PROMPTS[:1], labels, bad)


def test_past_a_sliding_window_is_refused(head):
    chat = tiny_chat_model("mistral")
    chat.model.config.sliding_window = 16
    with pytest.raises(InputError, match="sliding window"):
        generate_pplm(chat.model, chat.tokenizer, PROMPTS[:1], [0], head)


BAGS = BagOfWords({"a-e": list(range(68, 73)), "vowels": [68, 72, 76, 82, 88], "z": [93]})


@pytest.fixture(scope="module")
def emotion_head():
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    return SimpleNamespace(weight=weight, bias=torch.ones(3), classes=["x", "y", "z"], layer=4)


ATTRIBUTES = {
    "bag": (lambda act, emotion: BAGS, [2, 1, 0], dict(layers="upper")),
    "bag, no KL": (lambda act, emotion: BAGS, [0, 0, 2], dict(layers="all", kl_scale=0.0, horizon_length=3)),
    "two heads": (
        lambda act, emotion: [Weighted(act, 2.0), Weighted(emotion)],
        [(0, 2), (3, 0), (1, 1)],
        dict(layers="middle", horizon_length=2),
    ),
    "head and bag": (
        lambda act, emotion: [Weighted(act), Weighted(BAGS, 0.3)],
        [(0, 2), (3, 0), (1, 1)],
        dict(layers="all", window_length=6),
    ),
    "two heads and a bag": (
        lambda act, emotion: (Weighted(BAGS, 0.1), Weighted(emotion, 0.5), Weighted(act)),
        [(0, 2, 3), (1, 1, 0), (2, 0, 2)],
        dict(layers=(1, 3), sample=False),
    ),
}


@pytest.mark.parametrize("case", ATTRIBUTES)
def test_attributes_equal_reference(chat, head, emotion_head, case):
    make, labels, change = ATTRIBUTES[case]
    config = PPLMConfig(**{"step_size": 0.3, "max_new_tokens": 3} | change)
    assert_equal_to_reference(chat, make(head, emotion_head), PROMPTS[:3], config, labels)


def test_rows_with_several_labels_end_early(head, emotion_head):
    chat = tiny_chat_model("gemma", dtype=torch.float64)
    chat.model.generation_config.eos_token_id = list(range(0, 260, 3))
    attributes = [Weighted(head), Weighted(emotion_head, 0.5), Weighted(BAGS, 2.0)]
    labels = [(i % 4, i % 3, (i + 1) % 3) for i in range(5)]
    config = PPLMConfig(layers="upper", step_size=0.3, max_new_tokens=6, top_k=0)
    out = assert_equal_to_reference(chat, attributes, PROMPTS[:5], config, labels)
    assert any(out.stopped) and len({len(ids) for ids in out.token_ids}) > 1


def test_one_attribute_in_a_list_is_the_attribute_alone(head, tiny_chat):
    chat = tiny_chat("llama")
    config = PPLMConfig(layers="all", step_size=0.3, max_new_tokens=2)
    alone = generate_pplm(chat.model, chat.tokenizer, PROMPTS[:2], [1, 2], head, config, trace=True)
    listed = generate_pplm(
        chat.model, chat.tokenizer, PROMPTS[:2], [(1,), (2,)], [Weighted(head)], config, trace=True
    )
    assert alone.token_ids == listed.token_ids and alone.losses == listed.losses
    assert alone.traces[0].target_probability.shape == (2, 3)


def test_a_trace_holds_each_attribute(head, tiny_chat):
    chat = tiny_chat("llama")
    attributes = [Weighted(head), Weighted(BAGS, 0.5)]
    config = PPLMConfig(layers="all", step_size=0.3, kl_scale=0.0, max_new_tokens=2)
    out = generate_pplm(chat.model, chat.tokenizer, PROMPTS[:1], [(1, 2)], attributes, config, trace=True)
    probability = out.traces[0].target_probability
    assert probability.shape == (2, 3, 2)
    expected = -probability[..., 0].log() - 0.5 * probability[..., 1].log()
    torch.testing.assert_close(out.traces[0].loss, expected)


def test_a_bag_alone_looks_no_step_ahead(tiny_chat):
    chat = tiny_chat("llama", torch.float32)
    calls = []
    hook = chat.model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    layer = chat.model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(0))
    try:
        config = PPLMConfig(layers="all", num_iterations=3, max_new_tokens=1)
        generate_pplm(chat.model, chat.tokenizer, PROMPTS[:2], [0, 1], BAGS, config)
    finally:
        hook.remove()
        layer.remove()
    assert calls.count(1) == 5 and calls.count(0) == 1 + 5  # the prompt; read, three times look, choose


def test_attributes_that_do_not_fit_are_refused_before_any_work(head, tiny_chat):
    chat = tiny_chat("llama", torch.float32)
    narrow = SimpleNamespace(**vars(head) | {"weight": torch.zeros(4, 32)})
    several = [Weighted(head), Weighted(BAGS)]
    for bad, labels, told in (
        (BAGS, [3], "label 3: need one of 0 \\(a-e\\), 1 \\(vowels\\)"),
        (BagOfWords({"far": [260]}), [0], "token 260"),
        ([Weighted(head), Weighted(narrow)], [(0, 0)], "shape"),
        (several, [(0, 3)], "label 3"),
        (several, [0], "one class id for each"),
        (several, [(0,)], "one class id for each"),
        (several, [(0, 0), (0, 0)], "2 labels for 1 prompts"),
        ([], [()], "no attribute"),
    ):
        with pytest.raises(InputError, match=told):
            generate_pplm(chat.model, chat.tokenizer, PROMPTS[:1], labels, bad)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "1", None, True])
def test_weights_are_finite_and_positive(head, weight):
    with pytest.raises(InputError, match="weight="):
        Weighted(head, weight)


def word_tokenizer(prepend):
    "Words and pieces of words as Llama-2's SentencePiece writes them, with the space before a word in its token."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", ".", "\u2581.", "\u2581", "\u2581sea", "\u2581light", "house", "sea"]
    model = models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("prepend", ["always", "never"])
def test_words_are_found_behind_a_space(prepend):
    tokenizer = word_tokenizer(prepend)
    bags = BagOfWords.from_words(tokenizer, {"sea": ["sea"]})
    assert tokenizer.convert_ids_to_tokens(bags.token_ids[0]) == ["\u2581sea"]
    with pytest.raises(InputError, match="'lighthouse', '\u00e9'"):
        BagOfWords.from_words(tokenizer, {"sea": ["sea", "lighthouse", "\u00e9"]})


@pytest.mark.parametrize("bags", [{}, {"a": []}, {"a": "boat"}, {"a": ["boat"]}, {"a": [" "]}])
def test_bags_without_usable_words_are_refused(bags):
    with pytest.raises(InputError, match="bag"):
        BagOfWords.from_words(byte_tokenizer(), bags)
