# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Keeps what a benchmark measured, beside what it was measured on:

results/DATE-DEVICE/environment.json   date, commit, device, link, versions
                    raw/STEP.json      what was measured
                    summary.json       the rows of every step
                    README.md          the same, to read
"""

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cpuinfo
import psutil
import torch
from rich.table import Table

from tests.support import ROOT

RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@cache
def environment() -> dict[str, str]:
    """What a result must say of this machine and this tree."""
    import vllm  # not before a benchmark has set its environment

    gpu = torch.cuda.is_available()
    fields = ("driver_version", "pcie.link.gen.max", "pcie.link.width.max")
    query = f"--query-gpu={','.join(fields)}"
    answer = _output("nvidia-smi", query, "--format=csv,noheader") if gpu else ""
    driver, generation, width = (answer.splitlines() or ["none,,"])[0].split(",")
    status = ("git", "status", "--porcelain", ".", f":!{RESULTS.relative_to(ROOT)}")
    head = ("git", "rev-parse", "--short", "HEAD")
    changed = " with changes" if _output(*status) else ""
    return {
        "date": date.today().isoformat(),
        "commit": (_output(*head) or os.environ.get("RESULTS_COMMIT", "unknown"))
        + changed,
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "driver": driver.strip(),
        "link": f"PCIe {generation.strip()} x{width.strip()}" if gpu else "none",
        "cpu": f"{cpuinfo.get_cpu_info().get('brand_raw', platform.machine())}, "
        f"{psutil.cpu_count()} threads",
        "host memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        **{name: _version(name) for name in ("torch", "triton")},
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def folder(base: Path = RESULTS) -> Path:
    """The folder below `base` of this environment's results, made if it is not there.
    Another environment of the same day and device has a number behind its name."""
    here = environment()
    device = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    for number in itertools.count(1):
        name = f"{here['date']}-{device}" + f"-{number}" * (number > 1)
        kept = base / name / "environment.json"
        if not kept.exists():
            (kept.parent / "raw").mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(here, indent=1) + "\n")
        if json.loads(kept.read_text()) == here:
            return kept.parent
    raise AssertionError("unreachable")


def save(
    place: Path, step: str, rows: list[Row], command: str, note: str = "", raw: Any = ()
) -> str:
    """Keeps the rows of a step, in the place of those that it had.

    Args:
        place: what `folder` returned.
        step: a name for a file.
        command: what was run.
        note: what the rows mean.
        raw: what the rows were made of, if it is not in its file already.

    Returns:
        The step's part of README.md.
    """
    if raw:
        (place / "raw" / f"{step}.json").write_text(json.dumps(raw, indent=1) + "\n")
    summary = place / "summary.json"
    steps = json.loads(summary.read_text()) if summary.exists() else {}
    steps[step] = {"command": command, "note": note, "rows": rows}
    summary.write_text(json.dumps(steps, indent=1) + "\n")
    parts = {name: _markdown(name, kept) for name, kept in steps.items()}
    here = json.loads((place / "environment.json").read_text())
    about = "\n".join(f"| {name} | {value} |" for name, value in here.items())
    title = f"# {here['device']}, {here['date']}\n\n|  |  |\n|---|---|\n{about}\n\n"
    (place / "README.md").write_text(title + "\n".join(parts.values()))
    return parts[step]


def _markdown(step: str, kept: Row) -> str:
    rows = kept["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## {step}", "", f"    {kept['command']}", ""]
    lines += [kept["note"], ""] if kept["note"] else []
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [
        f"| {' | '.join(_shown(row.get(name, '')) for name in columns)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rows_of(table: Table) -> list[Row]:
    """The rows of a table that is printed."""
    names = [str(column.header) for column in table.columns]
    cells = zip(*(column.cells for column in table.columns), strict=True)
    return [dict(zip(names, map(str, row), strict=True)) for row in cells]


def save_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save", action="store_true", help="keep the result in benchmarks/results/"
    )


def save_tables(step: str, tables: list[Table], note: str = "") -> Path:
    """Keeps printed tables: the only one as `step`, several as `step-1`, `step-2` ...

    Returns:
        The folder.
    """
    place = folder()
    module = sys.modules["__main__"].__spec__
    command = f"python -m {module.name if module else step} {' '.join(sys.argv[1:])}"
    for number, table in enumerate(tables, 1):
        name = step if len(tables) == 1 else f"{step}-{number}"
        about = "\n\n".join(filter(None, (str(table.title or ""), note)))
        rows = rows_of(table)
        save(place, name, rows, command, about, raw=rows)
    return place
