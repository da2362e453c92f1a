# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every command that the README and the pages print is there, takes these arguments,
and is run by a test."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.commands import PAGES, Command, commands, commands_of, python_of
from tests.support import ROOT
from tests.support.named_tests import is_there

NOT_RUN = "not run: "
RUN_BY = {
    r"make (setup|install)": NOT_RUN + "every other target runs it first",
    r"make demo": "engine/test_server.py::test_the_demo",
    r"make (test|lint)": NOT_RUN + ".ci/run runs both",
    r"make test-[\w-]+": NOT_RUN + "`make test` with other rows of the same tests",
    r"make bench": "benchmarks/test_bench.py::test_what_slots_cost",
    r"make docs": "docs/test_pictures.py::test_drawing_again_gives_the_same_bytes",
    r"make compat .*": NOT_RUN + "it fetches a release",
    r"vllm serve --help.*": (
        "plugin/test_flag.py::test_help_has_a_group_with_every_option"
    ),
    r"vllm serve( .*)?": "engine/test_server.py::test_answers_equal_stock",
    r"vllm bench serve.*": "engine/test_server.py::test_bench_serve",
    r"vllm bench throughput.*": "engine/test_server.py::test_bench_throughput",
    r"vllm bench latency.*": "engine/test_server.py::test_bench_latency",
    r"vllm run-batch.*": "engine/test_server.py::test_run_batch",
    r"vllm moe-prefetch plan": NOT_RUN + "its name in vLLM's own tree",
    r"vllm-moe-prefetch plan.*": "capacity/test_plan_elsewhere.py::test_what_it_counts",
    r"vllm-moe-prefetch tune.*": (
        "simulation/test_tune_command.py::test_the_table_and_the_flag"
    ),
    r"vllm-moe-prefetch stores.*": (
        "shared_store/test_store.py::test_the_command_lists_and_removes"
    ),
    r"python -m benchmarks\.cpu\.overhead.*": (
        "benchmarks/test_bench.py::test_what_slots_cost"
    ),
    r"python -m benchmarks\.cpu\.tune.*": (
        "simulation/test_tune_simulation.py::test_the_benchmark"
    ),
    r"python -m benchmarks\.cpu\.loading.*": (
        "benchmarks/test_bench.py::test_what_loading_costs"
    ),
    r"python -m benchmarks\.cpu\.endurance.*": (
        "endurance/test_endurance.py::test_a_minute_under_load"
    ),
    r"python -m benchmarks\.routing": "simulation/test_routing.py::test_the_command",
    r"python -m benchmarks\.policies": "simulation/test_policies.py::test_the_command",
    r"python -m benchmarks\.gpu\.proof.*": (
        "benchmarks/test_proof.py::test_help_and_the_refusal_without_a_gpu"
    ),
    r"python -m tools\.sizing_table": (
        "capacity/test_plan_elsewhere.py::test_a_cell_of_the_table_in_the_docs"
    ),
    r"python -m tools\.draw_panels .*": (
        "examples/test_grafana.py::test_every_panel_shows_data"
    ),
    r"python -m tools\.small_moe\.record .*": (
        "tools/test_record.py::test_a_trace_of_a_few_requests"
    ),
    r"python -m tools\.train_small_moe .*": (
        "tools/test_train_small_moe.py::"
        "test_a_few_steps_learn_something_and_write_a_checkpoint"
    ),
    r"python -m tools\.mutate": "refusals/test_mutate.py::test_one_is_taken_out",
    r"python -m tools\.pictures": (
        "docs/test_pictures.py::test_drawing_again_gives_the_same_bytes"
    ),
    r"python -m tools\.compile_kernels.*": (
        "cuda/test_compile.py::test_kernels_compile_without_spilling"
    ),
    r"python examples/openai_client\.py.*": (
        "engine/test_server.py::"
        "test_the_example_client_prints_the_answer_and_the_hit_rate"
    ),
    r"pytest .*": NOT_RUN + "`make test` runs these directories",
    r"curl .*/metrics": "engine/test_server.py::test_metrics_show_the_offload",
    r"curl .*/collective_rpc.*": (
        "endurance/test_endurance.py::test_a_minute_under_load"
    ),
    r"curl .*": "engine/test_server.py::test_answers_equal_stock",
    r"python -c .*": "docs/test_commands.py::test_its_parser_takes_the_arguments",
    r"pip uninstall .*": NOT_RUN + "the tests need the package",
    r"pip install .*": NOT_RUN + "`make install` installs the same package",
    r"docker (build|compose) .*|kubectl apply .*": (
        NOT_RUN + "their files are parsed only, by examples/test_deployment.py"
    ),
    r"(df|mount) .*": NOT_RUN + "a tool of the system",
}
"""The test that runs each command in a small form, below tests/; or why none does."""

PLACEHOLDERS = {"N": "8", "N|SIZE|auto": "8", "SIZE": "12GiB", "lru|lfu": "lru"}
"""What a parser is given for a word of a page. Other words in capitals are texts."""

PARTS_OF_LINT = ("format-check", "types-check")
"""Targets that no page needs to name."""

FOUND = [command for page in PAGES for command in commands_of(page)]
URLS = ("metrics", "health", "v1/models")


def words(command: Command) -> list[str]:
    """Those for a parser."""
    given = (w.strip("[]") for w in command.words if w not in ("...", "…"))
    return [PLACEHOLDERS.get(word, word) for word in given]


def of(*programs: str) -> list[Command]:
    """Those that are printed of some programs, each text once."""
    found = {command.text: command for command in reversed(FOUND)}
    return [command for command in found.values() if command.words[0] in programs]


def is_run(command: Command) -> str | None:
    text = " ".join(command.words)
    return next(
        (by for row, by in RUN_BY.items() if re.fullmatch(row, text, re.S)), None
    )


@pytest.mark.parametrize("command", FOUND, ids=str)
def test_a_test_runs_it(command):
    """In a small form, or the table says why none does."""
    by = is_run(command)
    assert by, (
        f"{command}\nis in no row of RUN_BY in tests/docs/test_commands.py. Add a row: "
        f"its pattern, and the test that runs it or {NOT_RUN!r} and the reason."
    )
    assert by.startswith(NOT_RUN) or is_there(by), f"RUN_BY names {by}: no such test"


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_make_has_the_target(command):
    given = [word for word in words(command)[1:] if not word.startswith("-")]
    done = subprocess.run(["make", "-n", *given], capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()


def test_every_target_of_make_is_in_a_row():
    """Or is a part of `make lint`."""
    database = subprocess.run(
        ["make", "--question", "--print-data-base", "setup"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout
    [targets] = re.findall(r"(?m)^\.PHONY: (.+)$", database)
    assert {"test-on-next", "docs"} <= set(targets.split())
    for target in targets.split():
        forms = (f"make {target}", f"make {target} VERSION=0.0.0")
        rows = [is_run(Command("Makefile", 1, form)) for form in forms]
        assert any(rows) or target in PARTS_OF_LINT, f"make {target}: no row of RUN_BY"


def test_make_test_runs_every_test():
    """No folder of tests is in none of its parts."""
    done = subprocess.run(
        ["make", "-n", "test"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    run = set(re.findall(r"[\w./]+", done.stdout))
    for file in (ROOT / "tests").rglob("test_*.py"):
        within = file.relative_to(ROOT)
        places = {str(place) for place in (within, *within.parents)}
        assert places & run, f"{file} is in none of the parts of `make test`"


@pytest.mark.parametrize("command", of("pytest"), ids=str)
def test_the_tests_are_there(command):
    for path in (word for word in command.words[1:] if word.startswith("tests")):
        assert (ROOT / path.partition("::")[0]).exists(), path


def python_file(command: Command) -> Path:
    """What `python -m MODULE` or `python FILE` runs."""
    if command.words[1] != "-m":
        return ROOT / command.words[1]
    module = command.words[2].replace(".", "/")
    package = ROOT / module / "__main__.py"
    return package if package.exists() else ROOT / f"{module}.py"


def parsed(*programs: str) -> list[Command]:
    """Those whose arguments a parser has to take."""
    every = of(*programs)
    return [c for c in every if not (is_run(c) or "").startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def objections(fresh, checkpoint):
    """What its own parser objects to, by the command's text: each program's commands in
    one process."""
    groups: dict[str, list[Command]] = {}
    for command in parsed("vllm", "vllm-moe-prefetch"):
        groups.setdefault(command.words[0], []).append(command)
    for command in parsed("python"):
        if command.words[1] == "-c":
            continue
        if "ArgumentParser" in python_file(command).read_text(encoding="utf-8"):
            groups.setdefault(str(python_file(command)), []).append(command)
    found = {}
    for group in groups.values():
        asked = [(argv(command), command.inline) for command in group]
        answers = ask_parsers(fresh, asked, checkpoint)
        found |= zip((command.text for command in group), answers, strict=True)
    return found


def ask_parsers(fresh, asked, checkpoint: Path) -> list[str]:
    """`real_parsers.objections`, in a process of its own."""
    ended = fresh(
        "from tests.docs.real_parsers import objections\n"
        f"print()\nprint(objections({asked!r}, {str(checkpoint)!r}))"
    )
    assert ended.status == 0, ended.output
    return json.loads(ended.output.splitlines()[-1])


def argv(command: Command) -> list[str]:
    """As `tests.docs.real_parsers` takes them."""
    given = words(command)
    if given[0] != "python":
        return given
    return given[2:] if given[1] == "-m" else given[1:]


@pytest.mark.parametrize(
    "command", parsed("vllm", "vllm-moe-prefetch", "python"), ids=str
)
def test_its_parser_takes_the_arguments(objections, command):
    """And of `vllm serve`, slots can be combined with them."""
    if command.words[1] == "-c":
        subprocess.run([sys.executable, *command.words[1:]], check=True, cwd=ROOT)
        return
    if command.text not in objections:
        assert len(argv(command)) == 1, f"{python_file(command)} takes no arguments"
        return
    assert objections[command.text] == ""


@pytest.mark.parametrize("command", of("curl"), ids=str)
def test_the_server_takes_the_request(command):
    """By vLLM's own model of its body."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    from vllm.plugins.moe_gpu_prefetch.worker import ExpertSlotsWorkerExtension

    [url] = (word for word in command.words if word.startswith("http://"))
    path = url.removeprefix("http://").partition("/")[2]
    if "-d" not in command.words:
        assert path in URLS
        return
    body = json.loads(command.words[command.words.index("-d") + 1])
    if path == "collective_rpc":
        assert callable(getattr(ExpertSlotsWorkerExtension, body["method"]))
        return
    kinds: dict[str, Any] = {
        "v1/chat/completions": ChatCompletionRequest,
        "v1/completions": CompletionRequest,
    }
    assert not kinds[path].model_validate(body).model_extra


def test_python_compiles():
    """Every block, and these pages have some."""
    found = {str(page.relative_to(ROOT)): python_of(page) for page in PAGES}
    for page in ("README", "docs/flags", "docs/observability", "docs/quickstart"):
        assert found[f"{page}.md"], f"{page}.md has no Python that python_of() finds"
    for name, texts in found.items():
        for text in texts:
            compile(text, name, "exec")


def test_every_form_of_a_command_is_found():
    """Blocks of both kinds, prompts, comments, lines that go on, pipes, prose; and
    nothing else."""
    page = """
Run `make one`, or `vllm serve
MODEL --two`; `vllm::op` and `make` are names.

    VARIABLE=1 python -m three   # a comment
    an output of it

* an item:

      vllm-moe-prefetch plan \\
          MODEL

```console
$ curl -d '{"four":
  4}' URL | grep x
five
```

```bash
six --as-well
```
"""
    found = [(command.line, command.words) for command in commands("page", page)]
    assert found == [
        (5, ["python", "-m", "three"]),
        (10, ["vllm-moe-prefetch", "plan", "MODEL"]),
        (14, ["curl", "-d", '{"four":\n4}', "URL"]),
        (20, ["six", "--as-well"]),
        (2, ["make", "one"]),
        (2, ["vllm", "serve", "MODEL", "--two"]),
    ]


@pytest.mark.parametrize(
    ("text", "objected"),
    [
        ("make nothing-of-the-kind", test_make_has_the_target),
        ("make nothing-of-the-kind", test_a_test_runs_it),
        ("pytest tests/nothing", test_the_tests_are_there),
    ],
)
def test_what_is_not_there_is_noticed(text, objected):
    with pytest.raises(AssertionError):
        objected(Command("page", 1, text))


def test_what_parsers_refuse_is_noticed(fresh, checkpoint):
    """An option that is not there, one that slots cannot be combined with, and, of a
    mention, one that its help does not name."""
    asked = [
        (["vllm", "serve", "MODEL", "--moe-gpu-prefetch", "8", "--nothing"], False),
        (["vllm", "serve", "MODEL", "--moe-gpu-prefetch", "8", "--enable-lora"], False),
        (["vllm-moe-prefetch", "plan", "--nothing"], True),
    ]
    unknown, conflict, mention = ask_parsers(fresh, asked, checkpoint)
    assert "unrecognized arguments: --nothing" in unknown
    assert "cannot be combined with --enable-lora" in conflict
    assert mention == "--nothing"
