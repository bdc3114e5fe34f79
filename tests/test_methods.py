"""Steering vectors, guided decoding and offsets equal their plain definitions, and leave no trace."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llama_dialogue.attribute.features import reply_features
from llama_dialogue.attribute.head import AttributeHead
from llama_dialogue.compare.methods import SteeringConfig, SteeringInputs, get_method, resolve_options, steer
from llama_dialogue.core.dialogues import Turn, balanced_sample, load_corpus, make_examples
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.generation import GenerationConfig, Generations, best_of_n, derive_seed, generate
from llama_dialogue.core.models import tiny_chat_model
from llama_dialogue.core.targets import ACTS
from llama_dialogue.perturb.cache import attention_by
from llama_dialogue.perturb.configs import GuidedConfig
from llama_dialogue.perturb.distil import (
    Offsets,
    _rotary_factors,
    _rotate,
    _total_perturbation,
    _unrotate,
    added_offsets,
    distil_offsets,
)
from llama_dialogue.perturb.guided import generate_guided, reference_guided
from llama_dialogue.perturb.pplm import generate_pplm
from llama_dialogue.perturb.pplm_config import PPLMConfig
from llama_dialogue.perturb.vectors import (
    SteeringVectors,
    added_vector,
    steering_vectors,
    vector_edit,
)
from llama_dialogue.prompting.prompts import build_prompt, class_instruction

FAMILIES = ("llama", "mistral", "qwen2", "gemma")
TEXTS = ["Why?", "The kettle is on the stove.", "No.", "Who on earth painted the gate pink, and when?", "Mm"]
PROMPTS = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in TEXTS]
LABELS = [0, 1, 2, 3, 1]
NAMES = [ACTS[label] for label in LABELS]
CONTEXTS = [(Turn(text),) for text in TEXTS]


def make_chat(family="llama", dtype=torch.float64):
    chat = tiny_chat_model(family, dtype=dtype)
    if family == "qwen2":  # whose biases begin at zero, so they would hide a lost one
        for layer in chat.model.get_decoder().layers:
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.bias.copy_(torch.linspace(-1, 1, len(projection.bias)))
    return chat


ready = functools.cache(make_chat)  # no test may change one


@pytest.fixture(params=FAMILIES)
def chat(request):
    return ready(request.param)


@pytest.fixture(scope="module")
def llama():
    return ready()


@pytest.fixture(scope="module")
def head():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return AttributeHead(weight, torch.zeros(4, dtype=torch.float64), ACTS)


@pytest.fixture(scope="module")
def examples():
    return balanced_sample(make_examples(load_corpus("sample")), n_per_label=4)


def random_offsets(chat, layers=(0, 1, 2, 3), size=0.3) -> Offsets:
    generator = torch.Generator().manual_seed(9)
    shape = (4, len(layers), 2, 16)
    keys, values = (size * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return Offsets(keys, values, ACTS, tuple(layers), chat.sha256, {}, {})


def logits_of(chat, prompt=PROMPTS[3]):
    ids = chat.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        begun = chat.model(ids[:, :-2], use_cache=True)
        last = chat.model(ids[:, -2:], past_key_values=begun.past_key_values)
    return torch.cat([begun.logits, last.logits], 1)


class Stumble(Exception):
    pass


def assert_undone(chat, edit):
    before = logits_of(chat)
    with edit():
        assert not torch.equal(logits_of(chat), before)
    assert torch.equal(logits_of(chat), before)
    with pytest.raises(Stumble), edit():
        raise Stumble
    assert torch.equal(logits_of(chat), before)


# --- replies that failed


def test_failed_is_false_unless_said_otherwise():
    assert Generations(["a", "b"], [[1], [2]], [False, False]).failed == [False, False]
    assert Generations(["a", "b"], [[1], [2]], [False, False], [True, False]).failed == [True, False]


def test_best_of_n_carries_it(llama):
    out = best_of_n(
        llama.model, llama.tokenizer, PROMPTS[:2], lambda n, ids: torch.arange(len(n)), 2, GenerationConfig(2)
    )
    assert out.failed == [False, False]


# --- steering vectors


def test_vectors_are_differences_of_class_means(llama, examples):
    vectors = steering_vectors(llama, examples, layers=(1, 3), pooling="reply", system="none")
    prompts = [build_prompt(llama.tokenizer, e.context, "none") for e in examples]
    replies = [llama.tokenizer(e.reply.text, add_special_tokens=False).input_ids for e in examples]
    states = []
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = llama.tokenizer(prompt, add_special_tokens=False).input_ids + reply
        with torch.no_grad():
            out = llama.model(torch.tensor([ids]), output_hidden_states=True)
        states.append(out.hidden_states[3][0, -len(reply) :])
    means = {
        a: torch.stack([s.mean(0) for s, e in zip(states, examples, strict=True) if e.reply.act == a])
        for a in ACTS
    }
    means = {a: rows.mean(0) for a, rows in means.items()}
    for c, act in enumerate(ACTS):
        others = torch.stack([mean for a, mean in means.items() if a != act]).mean(0)
        difference, typical = means[act] - others, torch.stack([s[-1].norm() for s in states]).median()
        expected = 0.7 * typical * difference / difference.norm()
        assert torch.allclose(vectors.vector(act, 3, 0.7).double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(vectors.natural[c, 1].double(), difference.norm() / typical, rtol=1e-4)


def test_a_vector_is_added_behind_its_layer_from_the_last_prompt_token_on(chat):
    entered, vector = [], torch.randn(64, dtype=torch.float64)
    ids = chat.tokenizer(PROMPTS[1], return_tensors="pt", add_special_tokens=False).input_ids
    handle = (
        chat.model.get_decoder().layers[2].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    )
    with torch.no_grad():
        plain = chat.model(ids)
        with added_vector(chat.model, 2, vector):
            chat.model(ids)
            begun = chat.model(ids[:, :-3], use_cache=True).past_key_values
            words = [chat.model(word, past_key_values=begun).logits for word in ids[:, -3:].split(1, 1)]
        with added_vector(chat.model, 2, vector, columns=4):
            at_once = chat.model(ids).logits
        with added_vector(chat.model, 2, vector, columns=10_000):
            everywhere = chat.model(ids).logits
    handle.remove()
    moved = (entered[1] - entered[0])[0]
    assert torch.allclose(moved[-1], vector) and not moved[:-1].any()
    assert torch.allclose(torch.cat(words, 1), at_once[:, -3:])
    assert torch.equal(at_once[:, :-4], plain.logits[:, :-4]) and not torch.allclose(
        everywhere[:, 0], plain.logits[:, 0]
    )


def test_a_vector_is_undone(chat):
    assert_undone(chat, lambda: added_vector(chat.model, 1, torch.ones(64), columns=3))


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_decoding_by_class_changes_no_row(chat, batch_size):
    config = GenerationConfig(max_new_tokens=5, batch_size=batch_size, repetition_penalty=1.2)
    prompts = PROMPTS + PROMPTS[:2]
    names = [*NAMES, "commissive", "question"]
    vectors = {
        name: 2 * torch.randn(64, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(ACTS)
    }

    def inside(classes):
        return added_vector(chat.model, 2, torch.stack([vectors[name] for name in classes]))

    plain = generate(chat.model, chat.tokenizer, prompts, config, seed=4)
    together = generate(
        chat.model, chat.tokenizer, prompts, config, seed=4, classes=names, edit_context=inside
    )
    assert together.token_ids != plain.token_ids
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        with added_vector(chat.model, 2, vectors[name]):
            alone = generate(chat.model, chat.tokenizer, [prompt], config, seed=4 + row)
        assert alone.token_ids[0] == together.token_ids[row]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_offsets_by_row_change_no_row(chat, batch_size):
    config = GenerationConfig(max_new_tokens=5, batch_size=batch_size)
    offsets = random_offsets(chat, size=0.5)

    def inside(classes):
        return added_offsets(chat.model, offsets, classes, 2.0)

    together = generate(
        chat.model, chat.tokenizer, PROMPTS, config, seed=4, classes=NAMES, edit_context=inside
    )
    assert together.token_ids != generate(chat.model, chat.tokenizer, PROMPTS, config, seed=4).token_ids
    for row, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        alone = generate(
            chat.model, chat.tokenizer, [prompt], config, seed=4 + row, classes=[name], edit_context=inside
        )
        assert alone.token_ids[0] == together.token_ids[row]


def test_a_vector_edit_gives_each_row_its_own(llama, examples):
    vectors = steering_vectors(llama, examples)
    edit = vector_edit(llama, vectors, 2, 0.5)
    ids = llama.tokenizer(PROMPTS[1], return_tensors="pt", add_special_tokens=False).input_ids
    entered = []
    handle = (
        llama.model.get_decoder().layers[2].register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    )
    with torch.no_grad():
        llama.model(ids.expand(2, -1))
        with edit(["question", "commissive"]):
            llama.model(ids.expand(2, -1))
    handle.remove()
    moved = (entered[1] - entered[0])[:, -1]
    wanted = torch.stack([vectors.vector(name, 2, 0.5) for name in ("question", "commissive")])
    assert torch.allclose(moved, wanted.to(moved), atol=1e-5)


def test_vectors_are_saved_whole(llama, examples, tmp_path):
    vectors = steering_vectors(llama, examples)
    assert vectors.layers == (1, 2, 3)
    again = SteeringVectors.from_pretrained(vectors.save_pretrained(tmp_path / "v"))
    assert torch.equal(again.directions, vectors.directions) and again.classes == ACTS
    (tmp_path / "v" / "vectors.json").write_text("{}")
    with pytest.raises(InputError, match="not whole"):
        SteeringVectors.from_pretrained(tmp_path / "v")
    with pytest.raises(InputError, match="no vectors.json"):
        SteeringVectors.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "attempt, told",
    [
        (lambda chat, e: steering_vectors(chat, e, layers=[4]), "1..3"),
        (lambda chat, e: steering_vectors(chat, e, layers=[0]), "1..3"),
        (lambda chat, e: steering_vectors(chat, e, layers=[]), "1..3"),
        (lambda chat, e: steering_vectors(chat, e, target="mood"), "target"),
        (lambda chat, e: steering_vectors(chat, [x for x in e if x.reply.act != "question"]), "'question'"),
        (lambda chat, e: steering_vectors(chat, e, layers=[2]).vector("question", 3), "layers=\\[3\\]"),
        (lambda chat, e: added_vector(chat.model, 5, torch.zeros(64)).__enter__(), "1..4"),
        (lambda chat, e: generate(chat.model, chat.tokenizer, PROMPTS, classes=NAMES[:2]), "2 classes for 5"),
    ],
)
def test_wrong_vectors_are_refused(llama, examples, attempt, told):
    with pytest.raises(InputError, match=told):
        attempt(llama, examples)


# --- guided decoding

GUIDED = {
    "sampled": dict(),
    "greedy": dict(sample=False, strength=3.0),
    "penalty": dict(repetition_penalty=1.4, strength=2.0, top_k=5),
    "temperature": dict(temperature=0.6, top_k=20, top_p=0.8),
    "small batches": dict(batch_size=2),
    "one candidate": dict(top_k=1),
}


def assert_equal_to_reference(chat, head, prompts, labels, config):
    out = generate_guided(chat.model, chat.tokenizer, prompts, labels, head, config, seed=100)
    for row, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
        plain = reference_guided(chat.model, chat.tokenizer, prompt, label, head, config, seed=100 + row)
        assert out.token_ids[row] == plain.token_ids[0] and out.stopped[row] == plain.stopped[0]
        own, theirs = (torch.tensor(p) for p in (out.target_probability[row], plain.target_probability[0]))
        assert (own - theirs).abs().max() < 1e-9
    return out


@pytest.mark.parametrize("case", GUIDED)
def test_guided_equals_the_plain_version(chat, head, case):
    config = GuidedConfig(**{"max_new_tokens": 3, "top_k": 7} | GUIDED[case])
    assert_equal_to_reference(chat, head, PROMPTS[:4], LABELS[:4], config)


def test_guided_rows_that_end_leave(chat, head):
    before = chat.model.generation_config.eos_token_id
    chat.model.generation_config.eos_token_id = list(range(0, 260, 3))
    try:
        config = GuidedConfig(max_new_tokens=6, top_k=12)
        out = assert_equal_to_reference(chat, head, PROMPTS, LABELS, config)
    finally:
        chat.model.generation_config.eos_token_id = before
    assert any(out.stopped) and len({len(ids) for ids in out.token_ids}) > 1


def test_guided_targets_of_one_prompt(llama, head):
    out = assert_equal_to_reference(
        llama, head, [PROMPTS[1]] * 4, range(4), GuidedConfig(max_new_tokens=3, strength=5.0)
    )
    assert len({tuple(ids) for ids in out.token_ids}) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"sample": False}, {"repetition_penalty": 1.3, "temperature": 0.8}])
def test_no_strength_is_plain_decoding(head, dtype, options):
    for family in FAMILIES:
        chat = ready(family, dtype)
        guided = GuidedConfig(max_new_tokens=8, strength=0.0, batch_size=3, **options)
        out = generate_guided(chat.model, chat.tokenizer, PROMPTS, LABELS, head, guided, seed=2)
        plain = GenerationConfig(max_new_tokens=8, **options)
        assert out.token_ids == generate(chat.model, chat.tokenizer, PROMPTS, plain, seed=2).token_ids


def test_tied_tokens_are_all_candidates(head):
    chat = make_chat()
    table = chat.model.get_output_embeddings().weight  # tied to the input, so equal rows are equal tokens
    table[100:130] = table[11]
    guided = GuidedConfig(max_new_tokens=8, strength=0.0, top_k=3, temperature=5.0)
    out = generate_guided(chat.model, chat.tokenizer, PROMPTS, LABELS, head, guided)
    plain = GenerationConfig(max_new_tokens=8, top_k=3, temperature=5.0)
    assert out.token_ids == generate(chat.model, chat.tokenizer, PROMPTS, plain).token_ids
    assert {i for ids in out.token_ids for i in ids} & set(range(100, 130))


def test_the_last_reading_is_the_finished_replys(chat, head):
    out = generate_guided(chat.model, chat.tokenizer, PROMPTS, LABELS, head, GuidedConfig(max_new_tokens=5))
    finished = head(reply_features(chat, PROMPTS, out.token_ids)).exp()[range(5), LABELS]
    last = torch.tensor([read[-1] for read in out.target_probability])
    assert torch.allclose(finished, last, rtol=1e-4, atol=1e-6)


def test_strength_leads_to_the_label(llama, head):
    def reached(strength):
        config = GuidedConfig(max_new_tokens=8, strength=strength)
        out = generate_guided(llama.model, llama.tokenizer, PROMPTS * 3, LABELS * 3, head, config)
        return sum(read[-1] for read in out.target_probability)

    assert reached(4.0) > reached(1.0) > reached(0.0)


def test_a_head_that_breaks_stops_its_rows_only(llama, head):
    broken = AttributeHead(head.weight, head.bias, ACTS)
    broken.bias.data[3] = -torch.inf
    config = GuidedConfig(max_new_tokens=3)
    out = generate_guided(llama.model, llama.tokenizer, PROMPTS[:3], [0, 3, 1], broken, config)
    assert out.failed == [False, True, False]
    assert [len(ids) for ids in out.token_ids] == [3, 0, 3]
    config = SteeringConfig(decoding=GenerationConfig(max_new_tokens=2))
    names = ["inform", "commissive"]
    said = steer("guided", llama, CONTEXTS[:2], names, SteeringInputs(head=broken), config)
    assert said.failed == [False, True]


@pytest.mark.parametrize(
    "change, labels, told",
    [
        (dict(layer=2), LABELS, "layer 2"),
        (dict(pooling="reply"), LABELS, "pooling"),
        ({}, [0, 1, 2, 3, 4], "label 4"),
        ({}, [0], "1 labels for 5"),
    ],
)
def test_wrong_guides_are_refused(llama, head, change, labels, told):
    other = AttributeHead(head.weight, head.bias, ACTS, **change)
    with pytest.raises(InputError, match=told):
        generate_guided(llama.model, llama.tokenizer, PROMPTS, labels, other)


def test_guided_needs_room(llama, head):
    with pytest.raises(InputError, match="context window"):
        generate_guided(
            llama.model, llama.tokenizer, PROMPTS, LABELS, head, GuidedConfig(max_new_tokens=2040)
        )
    mistral = make_chat("mistral")
    mistral.model.config.sliding_window = 16
    with pytest.raises(InputError, match="sliding window"):
        generate_guided(mistral.model, mistral.tokenizer, PROMPTS, LABELS, head)


# --- offsets


def test_turning_keys_there_and_back(chat):
    cos, sin = _rotary_factors(chat.model, 300, torch.float64)
    keys = torch.randn(2, 3, 300, 16, dtype=torch.float64)
    assert torch.allclose(_unrotate(_rotate(keys, cos, sin), cos, sin), keys, atol=1e-12, rtol=0)
    assert torch.allclose(
        _unrotate(_rotate(keys, 2 * cos, 2 * sin), 2 * cos, 2 * sin), keys, atol=1e-12, rtol=0
    )
    assert not torch.allclose(_rotate(keys, cos, sin), keys)


def test_offsets_equal_adding_to_the_cache_by_hand(chat):
    offsets = random_offsets(chat)

    def by_hand(module, query, key, value, attention_mask, **kwargs):
        i = offsets.layers.index(module.layer_idx)
        cos, sin = _rotary_factors(chat.model, key.shape[2], torch.float64)
        key = key + 1.5 * _rotate(offsets.keys[1, i][:, None].expand(-1, len(cos), -1), cos, sin)
        value = value + 1.5 * offsets.values[1, i][:, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("offsets_by_hand", by_hand)
    ids = chat.tokenizer(PROMPTS[3], return_tensors="pt", add_special_tokens=False).input_ids

    def read():
        with torch.no_grad():
            begun = chat.model(ids[:, :-3], use_cache=True)
            cache = begun.past_key_values
            words = [chat.model(word, past_key_values=cache).logits for word in ids[:, -3:].split(1, 1)]
        return torch.cat([begun.logits, *words], 1)

    plain = read()
    with added_offsets(chat.model, offsets, ["question"], 1.5):
        biased = read()
    with attention_by(chat.model, "offsets_by_hand"):
        expected = read()
    assert (biased - expected).abs().max() < 1e-9 and (biased - plain).abs().max() > 1e-3


def test_the_cache_of_one_layer_moves_by_the_turned_offset(chat):
    offsets = random_offsets(chat, layers=(3,))
    ids = chat.tokenizer(PROMPTS[0], return_tensors="pt", add_special_tokens=False).input_ids
    caches = []
    for edit in (nullcontext(), added_offsets(chat.model, offsets, ["inform"], 2.0)):
        with edit, torch.no_grad():
            caches.append(chat.model(ids, use_cache=True).past_key_values.layers)
    cos, sin = _rotary_factors(chat.model, ids.shape[1], torch.float64)
    turned = _rotate(offsets.keys[0, 0][:, None].expand(-1, ids.shape[1], -1), cos, sin)
    assert torch.allclose(caches[1][3].keys - caches[0][3].keys, 2 * turned[None], atol=1e-9)
    assert torch.allclose(
        caches[1][3].values - caches[0][3].values, 2 * offsets.values[0, 0][None, :, None], atol=1e-9
    )
    assert torch.equal(caches[1][2].keys, caches[0][2].keys)


def test_offsets_are_undone(chat):
    offsets = random_offsets(chat, layers=(1, 2))
    biases = [
        p.bias
        for layer in chat.model.get_decoder().layers
        for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    names = list(chat.model.state_dict())
    assert_undone(chat, lambda: added_offsets(chat.model, offsets, ["directive"]))
    after = [
        p.bias
        for layer in chat.model.get_decoder().layers
        for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    ]
    assert all(a is b for a, b in zip(biases, after, strict=True)) and list(chat.model.state_dict()) == names


def test_total_perturbation_sums_what_covered_a_position():
    deltas = [torch.randn(1, 2, 2, length, 4) for length in (3, 4, 5)]
    total = _total_perturbation(deltas)
    assert torch.allclose(total[..., 0, :], sum(delta[..., 0, :] for delta in deltas))
    assert torch.allclose(total[..., 3, :], deltas[1][..., 3, :] + deltas[2][..., 3, :])
    assert torch.equal(total[..., 4, :], deltas[2][..., 4, :])


def test_offsets_are_the_average_total_perturbation(chat, head):
    config = PPLMConfig(layers="middle", step_size=0.3, max_new_tokens=3)
    offsets = distil_offsets(chat, head, CONTEXTS[:2], config, system="none", seed=6, batch_size=5)
    layers = offsets.layers
    sums = {act: [torch.zeros(2, len(layers), 2, 16, dtype=torch.float64), 0] for act in ACTS}
    for context in CONTEXTS[:2]:
        prompt = build_prompt(chat.tokenizer, context, "none")
        for label, act in enumerate(ACTS):
            out = generate_pplm(
                chat.model, chat.tokenizer, [prompt], [label], head, config,
                seeds=[derive_seed(prompt, act, 6)], return_deltas=True,
            )  # fmt: skip
            steps = out.deltas[0]
            length = steps[-1].shape[-2]
            cos, sin = _rotary_factors(chat.model, length, torch.float64)
            mean = torch.zeros(2, len(layers), 2, 16, dtype=torch.float64)
            for place in range(length):
                for step in steps:
                    if place < step.shape[-2]:
                        here = (cos[place : place + 1], sin[place : place + 1])
                        key, value = step[:, 0, :, place : place + 1], step[:, 1, :, place]
                        mean += torch.stack([_unrotate(key, *here)[:, :, 0], value]) / length
            sums[act][0] += mean
            sums[act][1] += 1
    for label, act in enumerate(ACTS):
        total, count = sums[act]
        assert count == offsets.report["replies"][label] == 2
        assert torch.allclose(offsets.keys[label], total[0] / 2, atol=1e-9, rtol=0)
        assert torch.allclose(offsets.values[label], total[1] / 2, atol=1e-9, rtol=0)
    assert all(0 < share < 1 for name in ("keys", "values") for share in offsets.report["common"][name])


def test_replies_that_broke_are_left_out(llama, head):
    broken = AttributeHead(head.weight, head.bias, ACTS)
    broken.bias.data[3] = -torch.inf
    with pytest.raises(InputError, match="'commissive' broke"):
        distil_offsets(llama, broken, CONTEXTS[:1], PPLMConfig(layers="all", max_new_tokens=2), system="none")


def test_offsets_are_saved_whole(llama, tmp_path):
    offsets = replace(
        random_offsets(llama), pplm=PPLMConfig(layers=(1, 3)).to_dict(), report={"replies": [1] * 4}
    )
    again = Offsets.from_pretrained(offsets.save_pretrained(tmp_path / "o"))
    assert torch.equal(again.keys, offsets.keys) and torch.equal(again.values, offsets.values)
    assert replace(again, keys=offsets.keys, values=offsets.values, name="unsaved") == offsets
    assert again.name == "o" and again.sha256 == offsets.sha256
    assert PPLMConfig.from_dict(again.pplm) == PPLMConfig(layers=(1, 3))
    (tmp_path / "o" / "offsets.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="damaged"):
        Offsets.from_pretrained(tmp_path / "o")


def test_a_small_offset_survives_in_bfloat16():
    chat = make_chat(dtype=torch.bfloat16)
    offsets = random_offsets(chat, layers=(0,), size=0.002)
    ids = torch.arange(4, 260)[None]
    caches = []
    for edit in (nullcontext(), added_offsets(chat.model, offsets, ["inform"])):
        with edit, torch.no_grad():
            caches.append(chat.model(ids, use_cache=True).past_key_values.layers[0].values[0].double())
    moved, wanted = (caches[1] - caches[0]).mean(1), offsets.values[0, 0]
    assert 0.8 < float((moved * wanted).sum() / wanted.square().sum()) < 1.2


# --- all of them


@pytest.fixture(scope="module")
def inputs(llama, head, examples):
    return SteeringInputs(head=head, vectors=steering_vectors(llama, examples), offsets=random_offsets(llama))


SMALL = SteeringConfig.from_dict(
    {
        "system": "none",
        "decoding": {"max_new_tokens": 4, "batch_size": 3},
        "best_of_n": {"n": 2},
        "guided": {"batch_size": 2},
        "pplm": {"layers": "all"},
    }
)
NEEDS = {  # method -> what it misses first
    "best_of_n": "head",
    "prompt_best_of_n": "head",
    "vector": "vectors",
    "distilled": "offsets",
    "guided": "head",
    "pplm": "head",
    "vector_best_of_n": "vectors",
    "distilled_best_of_n": "offsets",
    "guided_best_of_n": "head",
}
METHODS = ("none", "prompt", *NEEDS)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_does_not_depend_on_its_neighbours(llama, inputs, method):
    together = steer(method, llama, CONTEXTS, NAMES, inputs, SMALL, seed=3)
    again = [
        steer(method, llama, [c], [a], inputs, SMALL, seeds=[3 + i])
        for i, (c, a) in enumerate(zip(CONTEXTS, NAMES, strict=True))
    ]
    assert together.token_ids == [one.token_ids[0] for one in again]
    assert together.failed == [False] * 5 and len(together.replies) == 5


@pytest.mark.parametrize("method", ["vector", "guided", "offsets"])
def test_no_strength_says_what_none_says(llama, inputs, method):
    said = steer(method, llama, CONTEXTS, NAMES, inputs, SMALL.override([f"{method}.strength=0"]))
    assert said.token_ids == steer("none", llama, CONTEXTS, NAMES, None, SMALL).token_ids


@pytest.mark.parametrize("method", NEEDS)
def test_what_is_missing_is_named_with_its_maker(llama, method):
    makers = {"head": "default_head", "vectors": "steering_vectors", "offsets": "distil_offsets"}
    for nothing in (None, SteeringInputs()):
        with pytest.raises(InputError, match=makers[NEEDS[method]]):
            steer(method, llama, CONTEXTS, NAMES, nothing, SMALL)


@pytest.mark.parametrize("method", [method for method, missing in NEEDS.items() if missing != "head"])
def test_what_was_made_on_another_model_is_refused(inputs, method):
    with pytest.raises(InputError, match="made on model"):
        steer(method, tiny_chat_model(seed=1), CONTEXTS, NAMES, inputs, SMALL)


def test_an_act_that_nobody_learned_is_refused(llama, head):
    two = SteeringInputs(head=AttributeHead(head.weight[:2], head.bias[:2], ACTS[:2]))
    with pytest.raises(InputError, match="'directive'"):
        steer("guided", llama, CONTEXTS[:1], ["directive"], two, SMALL)


def test_prompted_candidates_are_read_after_the_bare_prompt(llama, head):
    acts, config = NAMES[:2], SMALL.override(["best_of_n.n=3", "decoding.temperature=3"])
    said = steer("prompt_best_of_n", llama, CONTEXTS[:2], acts, SteeringInputs(head=head), config)
    prompts = [build_prompt(llama.tokenizer, c, "none") for c in CONTEXTS[:2]]
    asked = [
        build_prompt(llama.tokenizer, c, "none", class_instruction("act", a))
        for c, a in zip(CONTEXTS[:2], acts, strict=True)
    ]
    seen = {}

    def score(numbers, ids):
        features = reply_features(llama, [prompts[i] for i in numbers], ids)
        seen["scores"] = head(features)[range(len(numbers)), [LABELS[i] for i in numbers]]
        return seen["scores"]

    by_hand = best_of_n(llama.model, llama.tokenizer, asked, score, 3, config.decoding)
    assert said.token_ids == by_hand.token_ids and len(seen["scores"]) == 6


def test_pplm_passes_on_what_failed(llama, head):
    broken = AttributeHead(head.weight, head.bias, ACTS)
    broken.bias.data[3] = -torch.inf
    names = ["inform", "commissive", "question"]
    out = steer("pplm", llama, CONTEXTS[:3], names, SteeringInputs(head=broken), SMALL)
    assert out.failed == [False, True, False] and out.token_ids[1] == []


@pytest.mark.parametrize(
    "change",
    [
        "vector.strength=-1",
        "guided.strength=.inf",
        "offsets.strength=.nan",
        "guided.top_k=0",
        "guided.batch_size=0",
        "vector.layer=0",
        "best_of_n.n=0",
    ],
)
def test_wrong_settings_are_refused(llama, inputs, change):
    path = change.partition("=")[0]
    method, config = path.partition(".")[0], SteeringConfig().override([change])
    with pytest.raises(InputError, match=path):
        resolve_options(get_method(method), config.options)
    with pytest.raises(InputError, match=path):
        steer(method, llama, CONTEXTS, NAMES, inputs, config)


def test_a_layer_without_vectors_is_refused(llama, inputs):
    with pytest.raises(InputError, match="layer=9"):
        steer("vector", llama, CONTEXTS, NAMES, inputs, SMALL.override(["vector.layer=9"]))


@pytest.mark.parametrize("method", ["vector", "offsets"])
def test_steered_candidates_compete(llama, inputs, method):
    more = ["best_of_n.n=3", "vector.strength=1", "offsets.strength=3", "decoding.temperature=3"]
    config = SMALL.override([f"best_of_n.of={method}", *more])
    said = steer("best_of_n", llama, CONTEXTS, NAMES, inputs, config, seed=3)
    for row, (context, act, label) in enumerate(zip(CONTEXTS, NAMES, LABELS, strict=True)):
        seeds = [3 + row, *(derive_seed(3 + row, k) for k in (1, 2))]
        tried = steer(method, llama, [context] * 3, [act] * 3, inputs, config, seeds=seeds)
        prompt = build_prompt(llama.tokenizer, context, "none")
        read = inputs.head(reply_features(llama, [prompt] * 3, tried.token_ids))[:, label]
        assert said.token_ids[row] == tried.token_ids[int(read.argmax())]
    without = SteeringInputs(vectors=inputs.vectors, offsets=inputs.offsets)
    with pytest.raises(InputError, match="without head"):
        steer("best_of_n", llama, CONTEXTS, NAMES, without, config)


def test_guided_candidates_compete(llama, head):
    config = SMALL.override(["best_of_n.n=3", "decoding.temperature=3"])
    said = steer("guided_best_of_n", llama, CONTEXTS, NAMES, SteeringInputs(head=head), config, seed=3)
    guided = GuidedConfig(max_new_tokens=4, temperature=3.0, batch_size=2)
    prompts = [build_prompt(llama.tokenizer, c, "none") for c in CONTEXTS]
    for row, (prompt, label) in enumerate(zip(prompts, LABELS, strict=True)):
        seeds = [3 + row, *(derive_seed(3 + row, k) for k in (1, 2))]
        tried = generate_guided(
            llama.model, llama.tokenizer, [prompt] * 3, [label] * 3, head, guided, seeds=seeds
        )
        read = head(reply_features(llama, [prompt] * 3, tried.token_ids))[:, label]
        assert said.token_ids[row] == tried.token_ids[int(read.argmax())]
