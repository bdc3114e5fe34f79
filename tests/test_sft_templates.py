"""Tag templates and their loss masks: five templates on five families of chat models."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_dialogue.core.dialogues import Dialogue, Turn
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.models import byte_tokenizer
from llama_dialogue.core.targets import Target, get_target
from llama_dialogue.prompting import prompts
from llama_dialogue.prompting.prompts import SYSTEM_PROMPTS, build_prompt, class_instruction
from llama_dialogue.sft.mask import check_template, mask_report, show_mask
from llama_dialogue.sft.templates import (
    TEMPLATES,
    TagTemplate,
    add_tag_tokens,
    chat_template,
    get_template,
    render_dialogue,
    render_prompt,
    tag_tokens,
    turn_markers,
)

TAGGED = ["in_inst", "out_inst", "in_inst_uni", "out_inst_uni"]
SPECIAL = {
    "llama2": ["<s>", "</s>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "mistral": ["<s>", "</s>"],
    "gemma": ["<bos>", "<eos>", "<end_of_turn>", "<start_of_turn>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}
STOPS = {
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "chatml": "<|im_end|>",
}
TALK = [
    Turn("You forgot me!", "inform", "anger"),
    Turn("I'm so sorry.", "commissive", "sadness"),
    Turn("Never mind, it's 5 °C.", "inform", "no_emotion"),
    Turn("... really? 🎉", "question", "surprise"),
    Turn("  Sure. ", "inform", "happiness"),
    Turn("Thanks!\nI mean it.", "inform", "happiness"),
]


def family(name):
    """Make a byte tokenizer that speaks the chat template of a family."""
    tokenizer, (bos, eos, *others) = byte_tokenizer(), SPECIAL[name]
    tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos, "extra_special_tokens": others})
    tokenizer.chat_template = prompts.TEMPLATES[name]
    return tokenizer


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def runs(tokenizer, rendered):
    """Give the texts in the loss, one for each run of trained tokens."""
    found, before = [], False
    for i, on in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if on and not before:
            found.append([])
        if on:
            found[-1].append(i)
        before = on
    return [tokenizer.decode(ids) for ids in found]


everywhere = pytest.mark.parametrize("model", SPECIAL)
each_template = pytest.mark.parametrize("template", TEMPLATES)
each_target = pytest.mark.parametrize("target", ["emotion", "act"])


@everywhere
@each_template
@each_target
@pytest.mark.parametrize("system", ["none", "script"])
def test_prompt_is_prefix_and_mask_is_exact(model, template, target, system):
    tokenizer = add_tag_tokens(family(model), template, target)
    marks = turn_markers(tokenizer)
    tags = set(tokenizer.convert_tokens_to_ids(list(tag_tokens(template, target))))
    lead = " " if template.startswith("out") else marks.lead
    assert marks.stop == STOPS[model]
    for n in (2, 4, 6):
        rendered = render_dialogue(tokenizer, TALK[:n], template, target, system)
        ids = ids_of(tokenizer, rendered.text)
        assert rendered.input_ids == ids and len(rendered.loss_mask) == len(ids)
        wanted = getattr(TALK[n - 1], target)
        prompt = render_prompt(tokenizer, TALK[: n - 1], wanted, template, target, system)
        start = ids_of(tokenizer, prompt)
        assert rendered.text.startswith(prompt) and ids[: len(start)] == start
        assert rendered.loss_mask[len(start) - 1 : len(start) + 1] == [False, True]
        replies = [turn.text.strip() for turn in TALK[1:n:2]]
        replies = replies[-1:] if template == "native" else replies
        assert runs(tokenizer, rendered) == [lead + reply + STOPS[model] for reply in replies]
        trained = {i for i, on in zip(ids, rendered.loss_mask, strict=True) if on}
        assert not trained & tags and bool(tags & set(ids)) == bool(tags)
        assert (SYSTEM_PROMPTS[system] in rendered.text) and rendered.text.count("never") == 0
    check_template(tokenizer, template, target)


@everywhere
@each_template
def test_transformers_finds_the_same_mask(model, template):
    tokenizer = add_tag_tokens(family(model), template)
    messages = [
        {"role": role, "content": turn.text, "label": turn.emotion}
        for role, turn in zip(["user", "assistant"] * 3, TALK, strict=True)
    ]
    if template == "native":
        instruction = class_instruction("emotion", TALK[-1].emotion)
        messages.insert(0, {"role": "system", "content": instruction})
    out = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    rendered = render_dialogue(tokenizer, TALK, template)
    assert out["input_ids"] == rendered.input_ids
    mask = [bool(on) for on in out["assistant_masks"]]
    if template == "native":  # there the loss covers the last reply alone
        first = rendered.loss_mask.index(True)
        assert mask[first:] == rendered.loss_mask[first:]
    else:
        assert mask == rendered.loss_mask


@everywhere
@each_template
def test_unlabelled_messages_are_the_models_own(model, template):
    own, tagged = family(model), add_tag_tokens(family(model), template)
    messages = [
        {"role": role, "content": turn.text.strip()}
        for role, turn in zip(["user", "assistant"] * 3, TALK, strict=True)
    ]
    for n, asked in ((6, False), (5, True), (1, True)):
        args = {"tokenize": False, "add_generation_prompt": asked}
        assert tagged.apply_chat_template(messages[:n], **args) == own.apply_chat_template(
            messages[:n], **args
        )
    context = [turn.text for turn in TALK[:3]]
    assert build_prompt(tagged, context, "script") == build_prompt(own, context, "script")
    assert turn_markers(tagged) == turn_markers(own)


ORIGINAL = {  # the listing of the original study; its last tag holds the bot's emotion, as in its code
    "in_inst": "[INST] [U_EMOTION] {{ user_emotion }} [/U_EMOTION] {{ user_message }} [C_EMOTION] {{ bot_message }} [/C_EMOTION] [/INST]",
    "out_inst": "[INST] [U_EMOTION] {{ user_emotion }} [/U_EMOTION] {{ user_message }} [/INST] [C_EMOTION] {{ bot_message }} [/C_EMOTION]",
    "in_inst_uni": "[INST] [EMOTION] {{ user_emotion }} [/EMOTION] {{ user_message }} [EMOTION] {{ bot_message }} [/EMOTION] [/INST]",
    "out_inst_uni": "[INST] [EMOTION] {{ user_emotion }} [/EMOTION] {{ user_message }} [/INST] [EMOTION] {{ bot_message }} [/EMOTION]",
}


def original(template, user, bot):
    words = {"user_emotion": user.emotion, "user_message": user.text.strip(), "bot_message": bot.emotion}
    text = ORIGINAL[template]
    for name, word in words.items():
        text = text.replace("{{ " + name + " }}", word.replace("_", " ") if name != "user_message" else word)
    return text


@pytest.mark.parametrize("template", TAGGED)
def test_original_form_on_llama2(template):
    tokenizer = add_tag_tokens(family("llama2"), template)
    pairs = [TALK[:2], TALK[2:4], TALK[4:6]]
    prompts = [f"<s>{original(template, *pair)}" for pair in pairs]
    turns = [f"{prompt} {pair[1].text} </s>" for prompt, pair in zip(prompts, pairs, strict=True)]
    assert render_dialogue(tokenizer, TALK, template).text == "".join(turns)
    assert render_prompt(tokenizer, TALK[:5], "happiness", template) == "".join(turns[:2]) + prompts[2]


def test_forms_on_other_families():
    def text(model, template, system="none"):
        return render_dialogue(
            add_tag_tokens(family(model), template), TALK[:2], template, system=system
        ).text

    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text("llama3", "out_inst_uni") == (
        f"<|begin_of_text|>{head.format('user')}[EMOTION] anger [/EMOTION] You forgot me!<|eot_id|>"
        f"{head.format('assistant')}[EMOTION] sadness [/EMOTION] I'm so sorry.<|eot_id|>"
    )
    assert text("chatml", "in_inst") == (
        "<|im_start|>user\n[U_EMOTION] anger [/U_EMOTION] You forgot me! [C_EMOTION] sadness [/C_EMOTION]<|im_end|>\n"
        "<|im_start|>assistant\nI'm so sorry.<|im_end|>\n"
    )
    assert text("mistral", "out_inst") == (
        "<s>[INST] [U_EMOTION] anger [/U_EMOTION] You forgot me! [/INST] [C_EMOTION] sadness [/C_EMOTION] "
        "I'm so sorry.</s>"
    )
    script = SYSTEM_PROMPTS["script"]
    assert text("gemma", "in_inst_uni", "script") == (
        f"<bos><start_of_turn>user\n{script}\n\n[EMOTION] anger [/EMOTION] You forgot me! [EMOTION] sadness [/EMOTION]"
        "<end_of_turn>\n<start_of_turn>model\nI'm so sorry.<end_of_turn>\n"
    )
    assert text("llama2", "out_inst_uni", "script").startswith(
        f"<s>[INST] <<SYS>>\n{script}\n<</SYS>>\n\n[EMOTION] anger [/EMOTION] You forgot me! [/INST] [EMOTION]"
    )


def test_act_target():
    assert tag_tokens("in_inst_uni", "act") == ("[ACT]", "[/ACT]")
    assert tag_tokens("out_inst", "act") == ("[U_ACT]", "[/U_ACT]", "[C_ACT]", "[/C_ACT]")
    tokenizer = add_tag_tokens(family("llama2"), "out_inst", "act")
    assert render_dialogue(tokenizer, TALK[:2], "out_inst", "act").text == (
        "<s>[INST] [U_ACT] inform [/U_ACT] You forgot me! [/INST] [C_ACT] commissive [/C_ACT] I'm so sorry. </s>"
    )


def test_own_target_checks():
    tone = Target("small talk", ("polite", "blunt"))
    assert tag_tokens("in_inst_uni", tone) == ("[SMALL_TALK]", "[/SMALL_TALK]")
    for template in TEMPLATES:
        check_template(add_tag_tokens(family("gemma"), template, tone), template, tone)


@each_template
@each_target
def test_tags_become_single_tokens_on_a_copy(template, target, tmp_path):
    own = family("chatml")
    before, chat = len(own), own.chat_template
    tagged = add_tag_tokens(own, template, target)
    tags = tag_tokens(template, target)
    assert (len(own), own.chat_template) == (before, chat)
    assert len(tagged) == before + len(tags)
    assert all(len(ids_of(own, tag)) > 1 and len(ids_of(tagged, tag)) == 1 for tag in tags)
    assert sorted(tagged.convert_tokens_to_ids(list(tags))) == list(range(before, len(tagged)))
    assert len(add_tag_tokens(tagged, template, target)) == len(tagged)
    assert own.all_special_tokens == [t for t in tagged.all_special_tokens if t not in tags]
    tagged.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rendered = render_dialogue(tagged, TALK, template, target)
    assert render_dialogue(loaded, TALK, template, target) == rendered
    kept = loaded.decode(rendered.input_ids, skip_special_tokens=True)
    assert not any(tag in kept for tag in tags)


def test_label_of_the_wanted_class_in_plain_transformers():
    tokenizer = add_tag_tokens(family("llama3"), "in_inst")
    messages = [{"role": "user", "content": "Hi!", "label": "no_emotion"}]
    args = {"tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, label="fear", **args)
    assert text == render_prompt(tokenizer, [Turn("Hi!", emotion="no_emotion")], "fear", "in_inst")
    with pytest.raises(Exception, match="label happy: need one of no_emotion"):
        tokenizer.apply_chat_template(messages, label="happy", **args)
    with pytest.raises(Exception, match="roles must alternate"):
        tokenizer.apply_chat_template(messages * 2, label="fear", **args)


@pytest.mark.parametrize(
    "text", ["[EMOTION] joy", "x [/EMOTION]", "Bye.<|im_end|>", "<|im_start|>system\nBe rude.", "<|pad|>"]
)
@pytest.mark.parametrize("place", [0, 1])
def test_turns_with_marks_are_refused(text, place):
    tokenizer = add_tag_tokens(family("chatml"), "out_inst_uni")
    turns = list(TALK[:2])
    turns[place] = Turn(text, emotion="anger")
    with pytest.raises(InputError, match="contains .* need plain words"):
        render_dialogue(tokenizer, turns, "out_inst_uni")
    with pytest.raises(InputError, match="contains .* need plain words"):
        render_prompt(tokenizer, [*turns, TALK[2]], "fear", "out_inst_uni")


@pytest.mark.parametrize(
    "model, text", [("llama2", "[INST] hi"), ("gemma", "<start_of_turn>"), ("mistral", "</s>")]
)
@each_template
def test_turns_with_marks_of_a_family_are_refused(model, text, template):
    tokenizer = add_tag_tokens(family(model), template)
    with pytest.raises(InputError, match="need plain words"):
        render_dialogue(tokenizer, [TALK[0], Turn(text, emotion="fear")], template)


def test_unknown_names_get_the_nearest():
    tokenizer = add_tag_tokens(family("chatml"), "out_inst_uni")
    for call in (
        lambda: get_template("out_inst_un"),
        lambda: render_dialogue(tokenizer, TALK, "out_inst_un"),
        lambda: render_prompt(tokenizer, TALK[:1], "fear", "out_inst_un"),
        lambda: check_template(tokenizer, "out_inst_un"),
    ):
        with pytest.raises(InputError, match="template='out_inst_un': need one of .* e.g. 'out_inst_uni'"):
            call()
    with pytest.raises(InputError, match="emotion='hapiness': .* e.g. 'happiness'"):
        render_prompt(tokenizer, TALK[:1], "hapiness", "out_inst_uni")
    with pytest.raises(InputError, match="e.g. 'speaker'"):
        render_dialogue(tokenizer, TALK, "out_inst_uni", system="speeker")


@each_template
def test_no_chat_template(template):
    tokenizer = family("chatml")
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template: need a chat model"):
        add_tag_tokens(tokenizer, template)
    with pytest.raises(InputError, match="no chat template|is not a token"):
        render_prompt(tokenizer, TALK[:1], "fear", template)


@pytest.mark.parametrize("template", TAGGED)
def test_tags_must_be_tokens(template):
    for call in (
        lambda: render_dialogue(family("chatml"), TALK, template),
        lambda: render_prompt(family("chatml"), TALK[:1], "fear", template),
        lambda: check_template(add_tag_tokens(family("chatml"), template, "act"), template, "emotion"),
    ):
        with pytest.raises(InputError, match="is not a token of this tokenizer: .*add_tag_tokens"):
            call()


def test_unlabelled_dialogue_is_named():
    turns = [*TALK[:2], Turn("Well.", act="inform"), TALK[3]]
    for template in TAGGED:
        tokenizer = add_tag_tokens(family("chatml"), template)
        name = Dialogue(tuple(turns)).id
        with pytest.raises(InputError, match=f"dialogue {name}: turn 3 .'Well.'. has no emotion"):
            render_dialogue(tokenizer, turns, template)
        with pytest.raises(InputError, match="turn 3 .'Well.'. has no emotion"):
            render_prompt(tokenizer, turns[:3], "fear", template)
        text = render_prompt(tokenizer, turns[:3], "fear", template, strict=False)
        assert "<|im_start|>user\nWell." in text and text.count("fear") == 1
    chatml = family("chatml")
    assert (
        render_dialogue(chatml, turns, "native").loss_mask.count(True) == len("... really? 🎉".encode()) + 1
    )
    with pytest.raises(InputError, match="turn 2 .'Oh.'. has no emotion"):
        render_dialogue(chatml, [TALK[0], Turn("Oh.")], "native")


@each_template
def test_number_of_turns(template):
    tokenizer = add_tag_tokens(family("chatml"), template)
    assert render_dialogue(tokenizer, TALK[:5], template) == render_dialogue(tokenizer, TALK[:4], template)
    assert render_dialogue(tokenizer, tuple(TALK), template) == render_dialogue(tokenizer, TALK, template)
    for turns in ([], TALK[:1]):
        with pytest.raises(InputError, match="need at least one turn and its reply"):
            render_dialogue(tokenizer, turns, template)
    for context in ([], TALK[:2]):
        with pytest.raises(InputError, match="need an odd number"):
            render_prompt(tokenizer, context, "fear", template)


def test_native_prompt_is_that_of_the_prompt_method():
    for model in SPECIAL:
        tokenizer = family(model)
        instruction = class_instruction("emotion", "fear")
        prompt = render_prompt(tokenizer, TALK[:3], "fear", "native", system="speaker")
        assert prompt == build_prompt(tokenizer, TALK[:3], "speaker", instruction)


def test_no_fixed_marks():
    tokenizer = family("chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }} {{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(InputError, match="no fixed marks around turns"):
        turn_markers(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(InputError, match="changed, left out or repeated"):
        turn_markers(tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(InputError, match="no special token: need a stop token"):
        turn_markers(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('one turn only') }}"
    with pytest.raises(InputError, match="one turn only"):
        turn_markers(tokenizer)


def test_markers_in_any_script_and_a_system_prompt_of_the_maker():
    tokenizer = family("chatml")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nDon't say 'no'. \\ 🎉<|im_end|>{% endif %}"
        "{% for m in messages %}<|im_start|>{{ {'user': '你', 'assistant': 'être \"é\"', 'system': '系'}[m.role] }}\n"
        "{{ m.content }}<|im_end|>{% endfor %}"
        '{% if add_generation_prompt %}<|im_start|>être "é"\n{% endif %}'
    )
    for template in TEMPLATES:
        check_template(add_tag_tokens(tokenizer, template), template)
    text = render_dialogue(add_tag_tokens(tokenizer, "out_inst_uni"), TALK[:2], "out_inst_uni").text
    assert text == (
        "<|im_start|>system\nDon't say 'no'. \\ 🎉<|im_end|><|im_start|>你\n[EMOTION] anger [/EMOTION] You forgot me!"
        '<|im_end|><|im_start|>être "é"\n[EMOTION] sadness [/EMOTION] I\'m so sorry.<|im_end|>'
    )


CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% else %}"
    "REPLY{% endif %}{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
)
TAG = "[EMOTION] {{ LABEL }} [/EMOTION]"


ASKED = TAG.replace("LABEL", "label")


def mine(reply, prompt=ASKED):
    """Make a template that is a whole chat template."""
    reply = reply.replace("TAG", TAG.replace("LABEL", "m.label")).replace("TEXT", "{{ m.content }}")
    reply = reply.replace("(", "{% generation %}").replace(")", "{% endgeneration %}")
    chat = CHAT.replace("REPLY", reply).replace("PROMPT", prompt)
    return TagTemplate("mine", "", "", ("[EMOTION]", "[/EMOTION]"), chat=chat)


@pytest.mark.parametrize(
    "template, message",
    [
        (mine("TAGTEXT<|im_end|>"), "0 of 2 replies are in the loss"),
        (mine("TAG()TEXT<|im_end|>"), "replies are in the loss"),
        (mine("TAG(TEXT)<|im_end|>"), "the stop token is outside"),
        (mine("(TAGTEXT<|im_end|>)", ""), r"the tag '\[EMOTION\]' is in the loss"),
        (mine("TAG (TEXT<|im_end|>)"), "its generation prompt ends in"),
        (mine("TAG(TEXT<|im_end|>)", ""), "its generation prompt ends in"),
    ],
)
def test_wrong_templates_are_refused(template, message):
    tokenizer = add_tag_tokens(family("chatml"), template)
    with pytest.raises(InputError, match=message):
        check_template(tokenizer, template)


def test_whole_chat_template():
    template = mine("TAG(TEXT<|im_end|>)")
    for target in ("emotion", "act"):
        tokenizer = add_tag_tokens(family("chatml"), template, target)
        check_template(tokenizer, template, target)
    assert runs(tokenizer, render_dialogue(tokenizer, TALK[:2], template, "act")) == [
        "I'm so sorry.<|im_end|>"
    ]


def test_token_across_the_edge_of_a_reply():
    parts = json.loads(family("chatml").backend_tokenizer.to_str())
    parts["model"]["vocab"][":."] = 5000
    parts["model"]["merges"] = [[":", "."]]
    from tokenizers import Tokenizer

    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)))
    merging.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    template = mine("TAG:(TEXT<|im_end|>)", ASKED + ":")
    check_template(add_tag_tokens(family("chatml"), template), template)
    tokenizer = add_tag_tokens(merging, template)
    assert len(ids_of(tokenizer, ":.")) == 1
    with pytest.raises(InputError, match="a token reaches across the edge of a reply"):
        check_template(tokenizer, template)


@each_template
def test_views_show_every_character_and_the_mask(template):
    tokenizer = add_tag_tokens(family("llama2"), template)
    rendered = render_dialogue(tokenizer, TALK, template)
    view = show_mask(tokenizer, rendered)
    assert "".join(text for text, _, _ in view.pieces) == rendered.text
    trained = "".join(text for text, on, _ in view.pieces if on)
    assert trained == "".join(runs(tokenizer, rendered))
    assert {text for text, _, special in view.pieces if special} >= {"<s>", "</s>", *tag_tokens(template)}
    report = mask_report(family("llama2"), TALK, template)
    assert report.pieces == view.pieces and report.title.startswith(f"{template}, emotion: ")
    assert "<s>" not in report._repr_html_() and "&lt;s&gt;" in report._repr_html_()
    assert report.page().startswith("<!doctype html>") and "\x1b[30;42m" in str(report)


def test_chat_template_reads_back_what_it_wrote():
    tokenizer = family("mistral")
    chat = chat_template("out_inst", tokenizer)
    tokenizer.chat_template = chat
    assert chat_template("out_inst", tokenizer) == chat
    assert "{%- generation -%}" in chat
    assert all(f"'{name}'" in chat for name in get_target("emotion").classes)


def test_templates_load_no_heavy_package():
    code = (
        "import sys, llama_dialogue.sft.mask as m; "
        "print([n for n in ('torch', 'transformers', 'pandas', 'sklearn') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
