# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The script that trains the small model, at a small size; and the checkpoint that it
left in examples/."""

import ast
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import MODEL, QUESTIONS
from tests.support import ROOT
from tools.small_moe.data import SHARES, Rows, bytes_of_tokens
from tools.small_moe.model import bits_per_byte, expert_use
from tools.small_moe.text import ALWAYS_HELD_OUT, DOMAINS, answer_of, collect

SIDES = ("training", "held_out")
SMALL = (
    *("--files", "12", "--vocabulary", "512", "--hidden", "64", "--heads", "2"),
    *("--layers", "2", "--experts", "8", "--expert-width", "32", "--length", "64"),
)


@pytest.fixture(scope="module")
def trained():
    """The committed checkpoint, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def held_out(trained):
    """[rows, tokens] of a text that the model was not trained on."""
    _, tokenizer = trained
    text = "".join((ROOT / name).read_text() for name in ALWAYS_HELD_OUT)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return ids[:, : ids.shape[1] // 256 * 256].view(-1, 256)


TWICE = """
import sys
from tools.train_small_moe import main
for name in ("first", "second"):
    assert main(["--output", sys.argv[1] + "/" + name, *sys.argv[2:]]) == 0
"""


def test_a_few_steps_learn_something_and_write_a_checkpoint(tmp_path):
    """The checkpoint loads, is the same when made once more, and says what it was made
    of. In a process of its own: an engine changes how torch adds up."""
    steps = ("--steps", "12", "--batch", "4")
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "a.trace").write_text("kept")
    command = [sys.executable, "-c", TWICE, str(tmp_path), *steps, *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits a byte before") == 2 * len(DOMAINS)
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("first", "second")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    facts = json.loads((tmp_path / "first" / "training.json").read_text())
    for domain in DOMAINS:
        before = facts["bits_per_byte_before"][domain]
        assert facts["bits_per_byte"][domain] < before - 0.1, domain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert (tmp_path / "second" / "a.trace").read_text() == "kept"


def test_the_split_keeps_files_apart():
    """A docstring is in the prose of the side that has its source; the held-out file of
    the repository is on no other side."""
    texts = collect(seed=0, most_files=150)
    sources = texts.held_out["code"]
    assert sources and not set(sources) & set(texts.training["code"])
    [contributing] = [(ROOT / name).read_text() for name in ALWAYS_HELD_OUT]
    assert contributing in texts.held_out["prose"]
    assert contributing not in texts.training["prose"]
    prose = {side: "".join(getattr(texts, side)["prose"]) for side in SIDES}
    documented = [text for s in sources if (text := ast.get_docstring(ast.parse(s)))]
    long = [text for text in documented if len(text) > 60]
    assert long
    for text in long:
        assert text in prose["held_out"] and text not in prose["training"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Read up to\nsize bytes.\n\nMore.", "Read up to size bytes."),
        ("f(x) -> y\n\nReturn the length of x", "Return the length of x."),
        ("Too short.", None),
        (">>> f(1)\n2", None),
        ("As in the following example:", None),
        ("A sentence. " * 40, ("A sentence. " * 26).strip()),
    ],
)
def test_an_answer_is_a_sentence(text, answer):
    assert answer_of(text) == answer


def test_a_batch_has_its_share_of_each_domain():
    """Prose, code and chat by `SHARES`; no row twice before all are read."""
    streams = {d: torch.arange(64 * 64) + n * 10_000 for n, d in enumerate(DOMAINS)}
    batches = Rows(streams, 64).batches(20, seed=0)
    batch = next(batches)
    assert batch.shape == (20, 64)
    counts = torch.bincount(batch[:, 0] // 10_000).tolist()
    assert counts == [20 * SHARES[domain] for domain in DOMAINS]
    starts = torch.cat([batch[:, 0], *(next(batches)[:, 0] for _ in range(3))])
    assert len(starts.unique()) == len(starts)


def test_the_checkpoint_is_small():
    size = sum(path.stat().st_size for path in MODEL.iterdir())
    assert size < 10e6, f"{size:,} bytes"


def test_the_checkpoint_has_learnt_to_write(trained, held_out):
    """A text that it has not seen takes it fewer bits than random weights need, which
    is more than three a byte."""
    model, tokenizer = trained
    token_bytes = bytes_of_tokens(tokenizer)
    assert bits_per_byte(model, held_out, token_bytes) < 2.4
    torch.manual_seed(0)
    random = AutoModelForCausalLM.from_config(model.config)
    assert bits_per_byte(random, held_out, token_bytes) > 3


def test_every_expert_is_used_and_prose_uses_others_than_code(trained, held_out):
    model, tokenizer = trained
    code = tokenizer((ROOT / "examples" / "demo.py").read_text(), return_tensors="pt")
    prose_use = expert_use(model, held_out)
    code_use = expert_use(model, code.input_ids[:, :512])
    assert ((prose_use + code_use) > 0).float().mean() > 0.95
    assert (prose_use - code_use).abs().sum(1).mean() / 2 > 0.2


def test_it_answers_in_sentences_and_ends(trained):
    model, tokenizer = trained
    for question in QUESTIONS:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
        )
        given = model.generate(**asked, max_new_tokens=100, do_sample=False)
        answer = given[0, asked["input_ids"].shape[1] :]
        assert answer[-1] == tokenizer.eos_token_id, question
        words = tokenizer.decode(answer, skip_special_tokens=True)
        assert re.match(r"[A-Z].*\w\.$", words, re.S) and len(words.split()) > 4, words
