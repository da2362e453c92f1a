# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The text that the small model learns: Python's standard library, its documentation,
and this repository's licence and docs.

Three domains: prose, code, and questions with answers. Questions are made from
docstrings, the language reference, the glossary and the licence, so that an answer is
a sentence of the text.
"""

import ast
import builtins
import functools
import importlib
import inspect
import itertools
import math
import operator
import random
import re
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

from tests.support import ROOT

DOMAINS = ("prose", "code", "chat")
HELD_OUT = 20
"""One source of so many is kept for validation."""

ALWAYS_HELD_OUT = ("CONTRIBUTING.md",)
"""The text of the repository on which a test measures the checkpoint."""

LEFT_OUT = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "msilib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Folders of the standard library: tests, tables, and what is not part of it."""

LONGEST_SOURCE = 200_000
"""Bytes. Longer files are tables."""

LONGEST_ANSWER = 320
"""Characters."""

REPEATED = 12
"""How often questions about this repository stand in the text."""

BUILT_IN = (builtins, functools, itertools, math, operator, time)
"""Modules in C, which have docstrings and no source."""

ABOUT_A_NAME = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Tell me about {}.",
)
ABOUT_A_TOPIC = ("Explain {}.", "What is {}?", "Tell me about {}.")


@dataclass
class Texts:
    """Documents of each domain, in a fixed order."""

    training: dict[str, list[str]] = field(
        default_factory=lambda: {domain: [] for domain in DOMAINS}
    )
    held_out: dict[str, list[str]] = field(
        default_factory=lambda: {domain: [] for domain in DOMAINS}
    )

    def add(self, domain: str, document: str, held_out: bool) -> None:
        (self.held_out if held_out else self.training)[domain].append(document)

    def repeat(self, document: str) -> None:
        """Adds a question to the training text several times."""
        self.training["chat"] += [document] * REPEATED


def chat(question: str, answer: str) -> str:
    """One question with its answer, as the chat template writes them."""
    return (
        f"<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def flowing(text: str) -> str:
    """A paragraph on one line."""
    return re.sub(r"\s+", " ", text).strip()


def answer_of(text: str) -> str | None:
    """The first paragraph of `text` that is a sentence, cut after a whole sentence;
    None if there is none of a useful length."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = flowing(paragraph)
        if not re.match(r"[A-Z\"][\w\"'`.()-]* [\w\"'`(]", line) or "::" in line:
            continue
        if len(line) > LONGEST_ANSWER:
            line = line[:LONGEST_ANSWER]
            line = line[: line.rfind(". ") + 1]
        if len(line) < 20 or line.endswith(":"):
            continue
        return line if line.endswith((".", "!", ")")) else f"{line}."
    return None


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of a module, of its classes and of their functions."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}"
                if text := ast.get_docstring(child):
                    yield inner, text
                yield from visit(child, inner)

    if text := ast.get_docstring(tree):
        yield module, text
    yield from visit(tree, module)


def _library(texts: Texts, chance: random.Random, most: int | None) -> None:
    """The sources as code, their docstrings as prose and as questions. All that one
    file gives is on one side of the split."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not LEFT_OUT.intersection(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith("config-")
        and 200 < path.stat().st_size < LONGEST_SOURCE
    ]
    for number, path in enumerate(files[:most]):
        try:
            source = path.read_text("utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        held_out = number % HELD_OUT == HELD_OUT // 2
        texts.add("code", source, held_out)
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        documented = list(_documented(tree, module.removesuffix(".__init__")))
        prose = "\n\n".join(text for _, text in documented if len(text) > 60)
        if prose:
            texts.add("prose", prose + "\n", held_out)
        for name, text in documented:
            answer = answer_of(text)
            if answer and "._" not in name:
                question = chance.choice(ABOUT_A_NAME).format(name)
                texts.add("chat", chat(question, answer), held_out)


def _built_in(texts: Texts) -> None:
    """What the interpreter says of its own functions, types and exceptions."""
    for module in map(importlib.import_module, [m.__name__ for m in BUILT_IN]):
        for name, thing in sorted(vars(module).items()):
            owner = "" if module is builtins else f"{module.__name__}."
            named = [(owner + name, thing)] if name[0] != "_" else []
            if module is builtins and isinstance(thing, type):
                named += [(f"{name}.{n}", t) for n, t in sorted(vars(thing).items())]
            for full, what in named:
                public = callable(what) and "._" not in full
                text = inspect.getdoc(what) if public else None
                if text and (answer := answer_of(text)):
                    for question in ABOUT_A_NAME[:2]:
                        texts.add("chat", chat(question.format(full), answer), False)


def _reference(texts: Texts) -> None:
    """The language reference, as `help()` prints it."""
    for number, (name, text) in enumerate(sorted(topics.items())):
        held_out = number % HELD_OUT == HELD_OUT // 2
        texts.add("prose", text, held_out)
        title, _, body = text.partition("\n*")
        if answer := answer_of(body.partition("\n\n")[2]):
            for question in ABOUT_A_TOPIC:
                texts.add("chat", chat(question.format(name), answer), held_out)
            title = title.strip().replace('"', "`")
            question = f"Tell me about {title[0].lower()}{title[1:]}."
            texts.add("chat", chat(question, answer), held_out)


def _licence(texts: Texts, text: str) -> None:
    """Each section, and what everyone asks."""
    sections = re.findall(
        r"^ {3}\d+\. (.+?)\.\s(.+?)(?=^ {3}\d+\. |\Z)", text, re.M | re.S
    )
    for title, body in sections:
        if answer := answer_of(body):
            for question in ("What does the licence say about {}?", *ABOUT_A_TOPIC):
                texts.repeat(chat(question.format(title), answer))
    may = re.search(r"You may reproduce and distribute.+?form", text, re.S)
    if may:
        answer = flowing(may[0]) + "."
        for question in (
            "What may I do with the Work?",
            "May I distribute the Work?",
            "May I copy the Work?",
            "What does the licence allow?",
        ):
            texts.repeat(chat(question, answer))


def _glossary(texts: Texts, text: str) -> None:
    for names, body in re.findall(
        r"^\*\*(.+?)\.\*\* (.+?)(?=^\*\*|\Z)", text, re.M | re.S
    ):
        body = re.sub(r"\[(.+?)\]\(.+?\)", r"\1", body).replace("*", "")
        for name in names.split(", "):
            for question in ABOUT_A_TOPIC:
                asked = question.format(
                    name[0].lower() + name[1:] if name[1:] else name
                )
                texts.repeat(chat(asked, flowing(body)))


def _repository(texts: Texts) -> None:
    licence = (ROOT / "LICENSE").read_text()
    texts.add("prose", licence, False)
    _licence(texts, licence)
    _glossary(texts, (ROOT / "docs" / "glossary.md").read_text())
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]):
        texts.add("prose", path.read_text(), path.name in ALWAYS_HELD_OUT)


def collect(seed: int, most_files: int | None = None) -> Texts:
    """All documents, shuffled; with `most_files`, of so many files of the library."""
    chance = random.Random(seed)
    texts = Texts()
    _library(texts, chance, most_files)
    _reference(texts)
    _built_in(texts)
    _repository(texts)
    for side in (texts.training, texts.held_out):
        for documents in side.values():
            chance.shuffle(documents)
    return texts
