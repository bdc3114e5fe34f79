"""Broken corpora: every fault names its file and line, and a lenient reading loses nothing silently."""

import json

import pytest

from llama_dialogue.core.dialogues import (
    Dialogue,
    Turn,
    load_corpus,
    read_dailydialog,
    read_hub,
    read_jsonl,
    write_jsonl,
)
from llama_dialogue.core.errors import InputError
from llama_dialogue.core.paths import sample_dir

TEXTS = [
    "Whose umbrella is this ? __eou__ Mine . __eou__",
    "We won ! __eou__ No way . __eou__",
    "Stop ! __eou__",
]
FILES = {"": TEXTS, "act_": ["2 1", "1 1", "3"], "emotion_": ["0 0", "4 6", "1"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train").mkdir()
    for kind, lines in FILES.items():
        (tmp_path / f"train/dialogues_{kind}train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def spoil(folder, kind, line, text):
    "Replace one line (from 1) of one of the three files; `text` may be bytes."
    path = folder / f"train/dialogues_{kind}train.txt"
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(b"\n".join(lines))


FAULTS = {
    "label missing": ("act_", 2, "1", "1 act labels for 2 turns"),
    "label too many": ("emotion_", 2, "4 6 0", "3 emotion labels for 2 turns"),
    "no labels": ("act_", 2, "", "0 act labels for 2 turns"),
    "act unknown": ("act_", 2, "1 5", "'5': need 1 (inform) to 4 (commissive)"),
    "act zero": ("act_", 2, "0 1", "'0'"),
    "emotion a word": ("emotion_", 2, "4 joy", "'joy': need 0 (no_emotion) to 6 (surprise)"),
    "text bad UTF-8": ("", 2, b"Caf\xe9 ! __eou__ No way . __eou__", "byte 0xe9 in column 4 is not UTF-8"),
    "labels bad UTF-8": ("act_", 2, b"1 \xff", "byte 0xff in column 3"),
    "empty turn": ("", 2, "We won ! __eou__ __eou__", "turn 2 is empty"),
    "cut line": ("", 2, "We won ! __eou__ No wa", "need __eou__ after each turn"),
    "blank line": ("", 2, "", "need __eou__ after each turn"),
}


@pytest.mark.parametrize("kind, line, text, message", FAULTS.values(), ids=FAULTS)
def test_faulty_line(folder, kind, line, text, message):
    spoil(folder, kind, line, text)
    with pytest.raises(InputError) as error:
        read_dailydialog(folder)
    assert f"dialogues_{kind}train.txt, line {line}: " in str(error.value) and message in str(error.value)
    corpus = read_dailydialog(folder, strict=False)
    assert [dialogue.turns[0].text for dialogue in corpus] == ["Whose umbrella is this?", "Stop!"]
    (skip,) = corpus.skipped
    assert (skip.file, skip.line) == (f"train/dialogues_{kind}train.txt", line) and message in skip.reason


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(
    "fault, message", [("missing", "no such file"), ("empty", "an empty file"), ("short", "lines")]
)
def test_faulty_file(folder, kind, fault, message):
    path = folder / f"train/dialogues_{kind}train.txt"
    if fault == "missing":
        path.unlink()
    else:
        path.write_text("" if fault == "empty" else "\n".join(FILES[kind][:2]))
    with pytest.raises(InputError, match=message) as error:
        read_dailydialog(folder)
    assert path.name in str(error.value)
    with pytest.raises(InputError, match="nothing could be read"):
        read_dailydialog(folder, strict=False)
    (folder / "test").mkdir()
    for kind, lines in FILES.items():
        (folder / f"test/dialogues_{kind}test.txt").write_text("\n".join(lines))
    corpus = read_dailydialog(folder, strict=False)
    assert len(corpus) == 3 and len(corpus.skipped) == 1 and corpus.skipped[0].line is None


def test_layouts(folder, tmp_path):
    flat = read_dailydialog(folder / "train")  # the three files in one folder
    assert flat.dialogues == read_dailydialog(folder, "train").dialogues
    for kind, name in (("", "text"), ("act_", "act"), ("emotion_", "emotion")):
        (folder / f"train/dialogues_{kind}train.txt").rename(tmp_path / f"dialogues_{name}.txt")
    (folder / "train").rmdir()
    whole = read_dailydialog(tmp_path)  # the undivided files of the download
    assert [dialogue.id for dialogue in whole] == [dialogue.id for dialogue in flat]
    assert {dialogue.split for dialogue in whole} == {None} and all(d.split for d in load_corpus(tmp_path))


def test_windows_files(folder):
    path = folder / "train/dialogues_train.txt"
    before = read_dailydialog(folder).dialogues
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read_dailydialog(folder).dialogues == before


def test_wrong_folder(tmp_path):
    with pytest.raises(InputError, match="no dialogues_"):
        read_dailydialog(tmp_path)
    with pytest.raises(InputError, match="trian"):
        read_dailydialog(tmp_path, "trian")
    with pytest.raises(InputError, match="nowhere"):
        load_corpus("nowhere")
    with pytest.raises(InputError, match="nowhere"):
        read_hub(str(tmp_path / "nowhere"))


LINES = {
    "not JSON": ('{"turns": [', "not JSON"),
    "not an object": ("[1, 2]", "no list of turns"),
    "no turns": ('{"topic": "work"}', "no list of turns"),
    "zero turns": ('{"turns": []}', "at least one turn"),
    "turn is a text": ('{"turns": ["Hi"]}', "no text in turn"),
    "blank text": ('{"turns": [{"text": " "}]}', "needs words"),
    "text a number": ('{"turns": [{"text": 5}]}', "needs words"),
    "unknown act": ('{"turns": [{"text": "Hi", "act": "informs"}]}', "'inform'"),
    "act a number": ('{"turns": [{"text": "Hi", "act": 1}]}', "act=1"),
    "unknown emotion": ('{"turns": [{"text": "Hi", "emotion": "angry"}]}', "'anger'"),
    "unknown key": ('{"turns": [{"text": "Hi", "emotoin": "fear"}]}', "'emotion'"),
    "unknown split": ('{"turns": [{"text": "Hi"}], "split": "dev"}', "split='dev'"),
    "topic a list": ('{"turns": [{"text": "Hi"}], "topic": []}', "topic=[]"),
    "half a character": ('{"turns": [{"text": "\\ud83d"}]}', "half a character"),
}


@pytest.mark.parametrize("line, message", LINES.values(), ids=LINES)
def test_faulty_json_line(tmp_path, line, message):
    path, good = tmp_path / "my.jsonl", '{"turns": [{"text": "Hello!"}]}'
    path.write_text(f"{good}\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        read_jsonl(path)
    assert "my.jsonl, line 2: " in str(error.value) and message in str(error.value)
    corpus = read_jsonl(path, strict=False)
    assert len(corpus) == 2 and [skip.line for skip in corpus.skipped] == [2]


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"turns": []}', b"\xff\xfe{\x00"])
def test_nothing_in_it(tmp_path, content):
    (tmp_path / "my.jsonl").write_bytes(content)
    for strict in (True, False):
        with pytest.raises(InputError, match="my.jsonl|nothing could be read"):
            read_jsonl(tmp_path / "my.jsonl", strict=strict)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = write_jsonl([Dialogue((Turn("Hello!"),))], tmp_path / "my.jsonl")
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_jsonl([Dialogue((Turn("Bye!"),)), "not a dialogue"], path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["my.jsonl"]


def test_sample_ids_are_the_hashes_of_the_turns():
    lines = (sample_dir() / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [dialogue.id for dialogue in load_corpus()]
