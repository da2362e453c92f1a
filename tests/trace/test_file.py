# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trace takes no other file's place."""

import os
import subprocess
import sys

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format
from vllm.model_executor.layers.fused_moe.expert_slots.trace.file import (
    check_trace_file,
    create_trace,
    trace_path,
)

HEADER = format.MAGIC + format.frame(format.HEADER, b"{}")


def write(path, data):
    descriptor = create_trace(path)
    os.write(descriptor, data)
    os.close(descriptor)


def test_an_earlier_trace_is_kept_once(tmp_path):
    """If it has steps. A server that starts again and again does not push it out."""
    path, previous = tmp_path / "a.trace", tmp_path / "a.trace.previous"
    steps = [HEADER + format.frame(format.STEPS, bytes([n])) for n in range(2)]
    write(path, steps[0])
    write(path, steps[1])
    for data in (HEADER, b"", format.MAGIC, HEADER):
        write(path, data)
    assert path.read_bytes() == HEADER and previous.read_bytes() == steps[1]
    assert sorted(tmp_path.iterdir()) == [path, previous]


def pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda path: path.mkdir(), "is not a regular file of this user"),
        (pipe, "is not a regular file of this user"),
        (lambda path: path.symlink_to("nowhere"), "is not a regular file of this user"),
        (lambda path: path.write_bytes(b"weights"), "is another file and no trace"),
    ],
)
def test_another_file_is_left_as_it_is(tmp_path, prepare, reason):
    path = tmp_path / "a.trace"
    prepare(path)
    before = path.lstat()
    for use in (check_trace_file, create_trace):
        with pytest.raises(MoEPrefetchError) as refusal:
            use(path)
        assert f"{path} {reason}" in str(refusal.value)
    assert path.lstat().st_ino == before.st_ino and len(list(tmp_path.iterdir())) == 1


def test_names_that_can_never_work(tmp_path):
    for path, reason in (
        (tmp_path / "none" / "a.trace", "a directory that does not exist"),
        (tmp_path / ("a" * 300), "cannot be used: File name too long"),
    ):
        with pytest.raises(MoEPrefetchError, match=reason):
            check_trace_file(path)
    check_trace_file(tmp_path / "a.trace")
    assert trace_path("a", 0).name == "a"
    assert trace_path("a", 3).name == "a.rank3"


def test_two_servers_do_not_record_into_one_file(tmp_path):
    path = tmp_path / "a.trace"
    descriptor = create_trace(path)
    os.write(descriptor, HEADER)
    other = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\n"
            f"from {check_trace_file.__module__} import check_trace_file\n"
            "check_trace_file(pathlib.Path(sys.argv[1]))",
            str(path),
        ],
        capture_output=True,
        text=True,
    )
    assert "is the trace that another server records" in other.stderr
    os.close(descriptor)
    check_trace_file(path)


def test_a_limit_that_is_too_small_is_refused():
    with pytest.raises(MoEPrefetchError, match="a trace needs at least 1MiB"):
        MoEPrefetchConfig.validated(8, {"trace_limit": "900KiB"})
