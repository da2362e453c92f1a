# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host memory that another process frees is waited for, and an error of the operating
system comes with the advice that fits it. No test here sleeps."""

import ctypes
import errno
import logging

import psutil
import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.capacity import (
    host_memory as module,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
    available_after_waiting,
    host_memory,
    pinning_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights import host_pages

GIB = 1 << 30


@pytest.fixture
def lines(caplog_vllm):
    """What was said about waiting."""
    caplog_vllm.set_level(logging.INFO, logger="vllm")
    return lambda: {message for message in caplog_vllm.messages if "Waiting" in message}


class Machine:
    """A machine whose available memory follows `course`, GiB at each reading, and its
    clock."""

    def __init__(self, *course):
        self.course, self.readings, self.now = course, 0, 0.0

    def read(self):
        available = self.course[min(self.readings, len(self.course) - 1)]
        self.readings += 1
        return HostMemory(128 * GIB, int(available * GIB))

    def sleep(self, seconds):
        self.now += seconds

    def wait_for(self, gib, **options):
        return available_after_waiting(
            int(gib * GIB),
            read=self.read,
            clock=lambda: self.now,
            sleep=self.sleep,
            **options,
        )


def test_enough_memory_is_not_waited_for(lines):
    machine = Machine(60)
    assert machine.wait_for(60).available == 60 * GIB
    assert machine.now == 0 and machine.readings == 1
    assert not lines()


def test_memory_that_comes_back_is_waited_for(lines):
    """A server that ended frees 57 GiB, after a while in which it unpins them. One line
    says so."""
    machine = Machine(10, 10, 10, 20, 30, 30, 45, 66)
    assert machine.wait_for(60).available == 66 * GIB
    assert machine.now == 3.5
    (line,) = lines()
    assert line.startswith(
        "Waiting up to 10 seconds for host memory: 60.0 GiB must be available, the "
        "reserve included, and 20.0 GiB are."
    )


def test_memory_that_does_not_come_back_is_refused_soon(lines):
    """Nothing grows, or as little as other processes explain: three more readings, and
    no line about waiting."""
    for course in ([10], [10, 9, 8, 7, 6], [10, 10.01, 10.02, 10.03, 10.04]):
        machine = Machine(*course)
        assert machine.wait_for(60).available < 11 * GIB
        assert machine.readings == 4 and machine.now == 1.5
    assert not lines()


def test_waiting_ends():
    """Memory that grows for ever and is never enough."""
    machine = Machine(*range(10, 100))
    assert machine.wait_for(200).available == 30 * GIB
    assert machine.now == 10.0
    machine = Machine(*range(10, 100))
    machine.wait_for(200, patience_s=2.0)
    assert machine.now == 2.0


def test_the_reserve_is_8_gib_or_a_tenth():
    """Whichever is more, or what the user gives."""
    assert HostMemory(64 * GIB, 0).reserve() == 8 * GIB
    assert HostMemory(500 * GIB, 0).reserve() == 50 * GIB
    assert HostMemory(500 * GIB, 0).reserve(0.5) == GIB // 2


def group(directory, limit, usage, cache, v1=False):
    """A control group with a memory limit, as the kernel shows it."""
    names = ("memory.max", "memory.current", "inactive_file")
    if v1:
        names = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_the_tightest_control_group_counts(tmp_path):
    """cgroup v2: a parent's limit binds too; page cache that can be dropped is
    available."""
    group(tmp_path / "job", 4 * GIB, 3 * GIB, GIB)
    group(tmp_path / "job" / "task", "max", 2 * GIB, GIB)
    memory = host_memory(tmp_path, "0::/job/task\n")
    assert memory == HostMemory(4 * GIB, 2 * GIB)


def test_control_groups_of_version_1_and_inside_containers(tmp_path):
    """v1 has its own directory and names; in a container the named path does not
    exist."""
    group(tmp_path / "memory", 2 * GIB, GIB, 0, v1=True)
    assert host_memory(tmp_path, "5:memory:/docker/ab\n4:cpu:/\n") == HostMemory(
        2 * GIB, GIB
    )


def test_without_limits_the_machine_counts(tmp_path):
    """No control group, no limit."""
    assert host_memory(tmp_path, "").total == psutil.virtual_memory().total


def test_where_stock_does_not_pin_nothing_is_pinned(monkeypatch):
    """We do as vLLM does. Its variable is the way out."""
    from vllm import envs

    monkeypatch.setattr(module, "is_pin_memory_available", lambda: True)
    assert pinning_objection() is None
    monkeypatch.setattr(module, "is_pin_memory_available", lambda: False)
    reason = pinning_objection()
    assert "WSL2" in reason and "VLLM_WSL2_ENABLE_PIN_MEMORY=1" in reason
    assert "VLLM_WSL2_ENABLE_PIN_MEMORY" in envs.environment_variables


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOMEM, "Cannot allocate memory. Free host memory, or raise"),
        (errno.EAGAIN, "ulimit -l"),
        (errno.EPERM, "ulimit -l"),
        (errno.ENOSPC, "df -h /dev/shm"),
        (errno.EACCES, "read and write the file"),
        (errno.ENODEV, "/dev/shm"),
        (errno.EMFILE, "Too many open files. Look up"),
    ],
)
def test_advice_follows_the_error(monkeypatch, number, advice):
    """Of mmap and of mprotect, as the operating system reports it."""

    def refuse(*_):
        ctypes.set_errno(number)
        return host_pages._MAP_FAILED

    class Libc:
        mmap = staticmethod(refuse)

    monkeypatch.setattr(host_pages, "_libc", Libc)
    with pytest.raises(MoEPrefetchError) as error:
        host_pages.HostPages(4096)
    text = str(error.value)
    assert (
        text.startswith("4,096 bytes of host memory cannot be mapped: ")
        and advice in text
    )
    assert text.endswith("or serve without --moe-gpu-prefetch.")


def test_a_real_refusal_names_its_error():
    with pytest.raises(
        MoEPrefetchError, match=r"cannot be mapped: Cannot allocate.*vm.max_map"
    ):
        host_pages.HostPages(1 << 60)
