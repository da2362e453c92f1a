# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The shell commands that the pages print, in blocks and inline; and their Python."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PAGES = sorted(
    page
    for place in (
        *("*.md", "docs/*.md", "benchmarks/*.md", "tools/*.md"),
        *("examples/*.md", "examples/*/*.md"),
    )
    for page in ROOT.glob(place)
)
PROGRAMS = (
    *("make", "vllm", "vllm-moe-prefetch", "python", "python3", "pytest", "pip", "uv"),
    *("curl", "docker", "kubectl", "git", "mount", "pre-commit", "nvidia-smi"),
    *("ruff", "mypy", "sysctl", "ulimit", "mkdir", "rm", "ls", "df", "cd", "export"),
    *("kill", "cp", "cat", "helm", "podman", "systemctl", "wsl", "grep"),
)
INLINE = ("make", "vllm", "vllm-moe-prefetch", "python", "python3", "pytest", "curl")
"""Those of `PROGRAMS` that an inline command may begin with."""
SHELLS = ("bash", "sh", "shell")
"""Blocks of these languages hold nothing else."""


@dataclass(frozen=True)
class Command:
    """One command as a page prints it: its line breaks, prompt and comment are gone."""

    page: str
    line: int
    text: str
    inline: bool = False

    @property
    def words(self) -> list[str]:
        """Without variables that are set for it, `sudo`, and what it is piped into."""
        words = shlex.split(self.text, comments=True)
        while re.match(r"\w+=", words[0]) or words[0] == "sudo":
            words.pop(0)
        ends = [i for i, word in enumerate(words) if word in ("|", "&&", ">", "&", ";")]
        return words[: ends[0]] if ends else words

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands_of(page: Path) -> list[Command]:
    """All of a page, in order."""
    return commands(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))


def commands(page: str, text: str) -> list[Command]:
    """All of the text of a page: first those in blocks, then those in its prose."""
    lines = text.splitlines()
    found = []
    for start, block, language in blocks(lines):
        for number, command in _joined(start, block):
            if _program(command) in PROGRAMS or language in SHELLS:
                found.append(Command(page, number, command))
    for number, line in _prose(lines):
        for span in re.findall(r"`([^`]+)`", line):
            if _program(span) in INLINE and " " in span:
                found.append(Command(page, number, span, inline=True))
    return found


def _program(text: str) -> str:
    return re.sub(r"^(\w+=\S+ |sudo )*", "", text).partition(" ")[0]


def _is_indented(lines: list[str], i: int) -> bool:
    return lines[i].startswith("    ") and not lines[i].lstrip().startswith("* ")


def blocks(lines: list[str]) -> Iterator[tuple[int, list[str], str]]:
    """First line number, lines, and language of every fenced or indented block."""
    i = 0
    while i < len(lines):
        fence = re.match(r"\s*(```+|~~~+)\s*(\w*)", lines[i])
        if fence:
            end = next(
                j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[1]
            )
            yield i + 2, _dedented(lines[i + 1 : end]), fence[2]
            i = end + 1
        elif _is_indented(lines, i) and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and _is_indented(lines, end):
                end += 1
            yield i + 1, _dedented(lines[i:end]), ""
            i = end
        else:
            i += 1


def _dedented(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).split("\n")


def python_of(page: Path) -> list[str]:
    """The Python blocks of a page: by their language, or by how they begin."""
    return [
        "\n".join(block)
        for _, block, language in blocks(page.read_text(encoding="utf-8").splitlines())
        if language in ("python", "py")
        or (not language and re.match(r"(from|import|llm|client|for)\b", block[0]))
    ]


def _prose(lines: list[str]) -> Iterator[tuple[int, str]]:
    """The other lines, each with its number. A span may go on in the next line."""
    inside = {
        number
        for start, block, language in blocks(lines)
        for number in range(start - 1, start + len(block) + bool(language))
    }
    for i, line in enumerate(lines):
        if i + 1 in inside:
            continue
        if line.count("`") % 2 and i + 1 < len(lines):
            line = f"{line} {lines[i + 1].strip()}"
            line = line[: line.rindex("`") + 1]
        yield i + 1, line


def _joined(start: int, block: list[str]) -> Iterator[tuple[int, str]]:
    """Logical lines: a backslash, or an open quote, goes on in the next line."""
    number, text = start, ""
    for i, line in enumerate(block):
        text = f"{text}{line.strip().removeprefix('$ ')}"
        if text.endswith("\\"):
            text = text[:-1]
            continue
        try:
            shlex.split(text, comments=True)
        except ValueError:
            text += "\n"
            if text.count("\n") < 40 and _program(text) in PROGRAMS:
                continue
        if text.strip():
            yield number, text.strip()
        number, text = start + i + 1, ""
