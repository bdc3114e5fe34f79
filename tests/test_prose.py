"""Every number in the text of a study comes from its records, its own outputs, or data/earlier_work.json."""

import html
import json
import re
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob

from llama_dialogue.core.records import results_dir

CFG = get_config()
STUDIES = [p for p in nbglob(as_path=True).sorted() if p.stem.endswith("_study")]

EVERYWHERE = {"95%": "the confidence level of every interval"}
ALLOWED = {  # number as written -> why no record, output or earlier figure holds it
    "attribute": {"4,406": "dialogues of the corpus, counted by `llama-dialogue corpus`"},
    "prompting": {},
    "perturb": {},
}

DECIMAL = r"\d+\.\d+|\d+(?=\s?%)|\d{1,3}(?:,\d{3})+"
NUMBER = re.compile(rf"(?<![\w.,])({DECIMAL})(?!\.?\d)\s?(%?)")
INTERVAL = re.compile(r"(?<![\w.])([-+\u2212]?\d+\.\d+) \[([-+\u2212]?\d+\.\d+), ([-+\u2212]?\d+\.\d+)\]")
PLAIN = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?")
RENDERED = re.compile(r"^(\S+\.json) sha256 [0-9a-f]{64}$", re.M)


def value_of(text):
    """Read a number as written: thousands have commas, minus may be a real minus sign."""
    return float(text.replace(",", "").replace("\u2212", "-"))


def rounds_to(value, text, scale=1.0):
    """Is `value` written as `text`, at the digits that `text` has?"""
    digits = len(text.partition(".")[2])
    return abs(value * scale - value_of(text)) <= 0.5 * 10**-digits * (1 + 1e-9)


def sentences(cells):
    """Give the sentences of markdown cells and figure captions; code spans are no prose."""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = "\n".join(re.findall(r"^#\|\s*fig-(?:cap|alt):\s*\"(.*)\"$", source, re.M))
        elif cell["cell_type"] != "markdown":
            continue
        source = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", source, flags=re.S)
        yield from (s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z*`(\[])|\n", source) if s.strip())


def shown(cells):
    """Give the text of all outputs, without images and hashes."""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        for text in (output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")):
            text = re.sub(r"sha256 [0-9a-f]{64}", "", "".join(text))
            yield html.unescape(re.sub(r"<[^>]*>", " ", text))


def leaves(value):
    """Give the numbers of a record, and its intervals as triples."""
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value):
            yield (value["value"], value["low"], value["high"])
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def untraced(notebook: Path, records: Path, earlier=(), allowed=None):
    """List the numbers of a notebook's prose that nothing holds, each with its sentence, and reasons never needed."""
    allowed = EVERYWHERE | (allowed or {})
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(shown(cells))
    told = "\n".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    found = [
        leaf
        for name in RENDERED.findall(told)
        for leaf in leaves(json.loads((records / name).read_text(encoding="utf-8")))
    ]
    intervals = [leaf for leaf in found if isinstance(leaf, tuple) and None not in leaf]
    intervals += [tuple(map(value_of, triple)) for triple in INTERVAL.findall(text)]
    # Records hold so many numbers that nearly every share of two digits is among them by chance: such a share
    # must be shown in an output, as a value and not as the end of an interval.
    seen = [value_of(n) for n in PLAIN.findall(INTERVAL.sub(r" \1 ", text))] + list(earlier)
    seen += [value_of(n) / 100 for n in re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s?%", text)]
    exact = seen + [leaf for leaf in found if not isinstance(leaf, tuple)]
    missing, used = [], set(EVERYWHERE)
    for sentence in sentences(cells):
        for triple in INTERVAL.findall(sentence):
            if not any(all(map(rounds_to, known, triple)) for known in intervals):
                missing.append(("{} [{}, {}]".format(*triple), sentence))
        for number, percent in NUMBER.findall(INTERVAL.sub(" ", sentence)):
            written = number + percent
            if written in allowed:
                used.add(written)
                continue
            known = exact if len(number.lstrip("0.").replace(".", "")) > 2 else seen
            if not any(rounds_to(value, number, 100 if percent else 1) for value in known):
                missing.append((written, sentence))
    return missing, sorted(set(allowed) - used)


def earlier_numbers():
    """Give every number of data/earlier_work.json."""
    entries = json.loads((CFG.config_path / "data" / "earlier_work.json").read_text(encoding="utf-8"))
    return [leaf for leaf in leaves(entries) if not isinstance(leaf, tuple)]


@pytest.mark.parametrize("notebook", STUDIES, ids=lambda p: p.relative_to(CFG.nbs_path).as_posix())
def test_numbers_of_prose_are_traced(notebook):
    missing, idle = untraced(
        notebook.absolute(), results_dir(), earlier_numbers(), ALLOWED.get(notebook.parent.name, {})
    )
    told = "\n".join(f"{number}: {sentence}" for number, sentence in missing)
    assert not missing, f"in no record, output or earlier work:\n{told}"
    assert not idle, f"reasons that no number needs any more: {idle}"


@pytest.fixture
def study(tmp_path):
    """Make a notebook of one record and some prose."""
    interval = {"value": 0.7434, "low": 0.7201, "high": 0.7653, "n": 1960}
    (tmp_path / "run.json").write_text(json.dumps({"metrics": {"accuracy": interval, "n": 29573}}))

    def make(*prose, caption="Nothing here."):
        told = f"run.json sha256 {'0' * 64}\n"
        code = {"cell_type": "code", "source": [f'#| fig-cap: "{caption}"\n', "plot()"]}
        code["outputs"] = [
            {"output_type": "stream", "text": [told]},
            {
                "output_type": "display_data",
                "data": {"text/html": ["<td>1.19</td><td>34%</td><td>0.07 [0.02, 0.12]</td>"]},
            },
        ]
        cells = [{"cell_type": "markdown", "source": [text]} for text in prose]
        path = tmp_path / "90_study.ipynb"
        path.write_text(json.dumps({"cells": [code, *cells]}))
        return path

    return make


@pytest.mark.parametrize(
    "prose",
    [
        "It is right in 0.743 of 29,573 replies; the difference is 0.07.",
        "It is right in 0.743 [0.720, 0.765] and in 74.3% (95% interval).",
        "It costs 1.19x, 34% more than before, a gain of +0.07 [0.02, 0.12].",
        "The default of `0.333` is code.",
    ],
)
def test_checker_traces(study, tmp_path, prose):
    assert untraced(study(prose), tmp_path) == ([], [])


@pytest.mark.parametrize(
    "prose, number",
    [
        ("It is right in 0.75 of replies.", "0.75"),
        ("It is right in 75% of replies.", "75%"),
        ("A share of two digits must be shown, 0.74 is not.", "0.74"),
        ("Nor is the end of an interval a value: 0.12.", "0.12"),
        ("It learns from 29,574 replies.", "29,574"),
        ("It is right in 0.74 [0.72, 0.78].", "0.74 [0.72, 0.78]"),
        ("It is right in 0.743443.", "0.743443"),
    ],
)
def test_checker_reports_the_number_and_its_sentence(study, tmp_path, prose, number):
    missing, _ = untraced(study("All is well. " + prose), tmp_path)
    assert missing == [(number, prose)]


def test_checker_reads_captions(study, tmp_path):
    missing, _ = untraced(study(caption="Dashed: 0.29."), tmp_path)
    assert missing == [("0.29", "Dashed: 0.29.")]


def test_checker_takes_earlier_work_and_reasons(study, tmp_path):
    prose = "Theirs is 81.1%, the budget 1.25."
    assert untraced(study(prose), tmp_path, [0.8115], {"1.25": "a budget"}) == ([], [])
    assert untraced(study("No number."), tmp_path, [0.8115], {"1.25": "a budget"}) == ([], ["1.25"])
