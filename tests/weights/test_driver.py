# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The driver's failures are exceptions with their names, every name that we use exists
in NVIDIA's package, and the stand-in refuses what the driver refuses."""

import ctypes
import re
import signal
import sys
from pathlib import Path

import pytest

from tests.support.fake_context import NAMES, REAL
from tests.support.fake_driver import FakeDriver, device_memory
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    driver as driver_module,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    memory as memory_module,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import (
    Driver,
    DriverError,
    cuda_driver,
)


def test_an_error_has_its_name():
    driver = Driver(FakeDriver())
    with pytest.raises(
        DriverError, match="refused cuMemCreate: CUDA_ERROR_INVALID_VALUE"
    ) as said:
        driver.call("cuMemCreate", 0, None, 0)
    assert (said.value.call, said.value.error) == (
        "cuMemCreate",
        "CUDA_ERROR_INVALID_VALUE",
    )
    driver.module.cuGetErrorName = lambda error: (
        driver.module.CUresult.CUDA_SUCCESS,
        None,
    )
    with pytest.raises(DriverError, match="error 1"):
        driver.call("cuMemCreate", 0, None, 0)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MoEPrefetchError, match="pip install 'cuda-bindings"):
        cuda_driver()


@pytest.mark.skipif(REAL is None, reason="needs cuda-bindings")
def test_every_name_exists_in_nvidias_package():
    assert cuda_driver().module is REAL
    text = (
        Path(memory_module.__file__).read_text()
        + Path(driver_module.__file__).read_text()
    )
    names = set(re.findall(r'"(cu[A-Z]\w+)"', text)) | {"cuGetErrorName"}
    assert len(names) > 15
    for name in names:
        assert callable(getattr(REAL, name)), name
    for name in set(re.findall(r"(?:cuda|module)\.(CU\w+)", text)):
        assert hasattr(REAL, name), name
    for owner, name in set(re.findall(r"cuda\.(CU[a-z]\w+)\.(CU\w+)", text)):
        assert hasattr(getattr(REAL, owner), name), (owner, name)
    for name in set(re.findall(r'"(CUDA_ERROR\w+)"', text)):
        assert hasattr(REAL.CUresult, name), name
    for owner, values in NAMES.items():  # what the stand-in has without the package
        for name, value in values.items():
            assert int(getattr(getattr(REAL, owner), name)) == value
    for name in ("CU_MEMHOSTREGISTER_PORTABLE", "CU_MEMHOSTREGISTER_DEVICEMAP"):
        assert getattr(REAL, name) == getattr(FakeDriver, name)
    properties = REAL.CUmemAllocationProp()
    location = REAL.CUmemLocation()
    location.type, location.id = REAL.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 2
    properties.location = location
    assert properties.location.id == 2
    flags = properties.allocFlags
    assert flags.gpuDirectRDMACapable == 0 and flags.compressionType == 0


def test_the_stand_in_refuses():
    d = FakeDriver()
    bad, ok, g = d.error.CUDA_ERROR_INVALID_VALUE, d.error.CUDA_SUCCESS, d.granularity
    memory = device_memory(d)
    assert d.cuMemCreate(g + 1, memory._properties, 0)[0] == bad
    _, a = d.cuMemAddressReserve(4 * g, 0, 0, 0)
    _, h = d.cuMemCreate(2 * g, memory._properties, 0)
    assert d.cuMemMap(a + 1, 2 * g, 0, h, 0)[0] == bad
    assert d.cuMemMap(a, g, g, h, 0)[0] == bad  # offset
    assert d.cuMemMap(a, g, 0, h, 0)[0] == bad  # a part
    assert d.cuMemMap(a + 3 * g, 2 * g, 0, h, 0)[0] == bad  # beyond the reservation
    assert d.cuMemMap(a, 2 * g, 0, h, 0)[0] == ok
    assert d.cuMemMap(a + g, 2 * g, 0, h, 0)[0] == bad  # mapped already
    assert d.cuMemMap(a + 2 * g, 2 * g, 0, h, 0)[0] == ok  # the same memory twice
    assert d.cuMemSetAccess(a, 3 * g, [memory._access], 1)[0] == bad
    assert d.cuMemUnmap(a, g)[0] == bad and d.cuMemAddressFree(a, 4 * g)[0] == bad
    assert d.cuMemSetAccess(a, 4 * g, [memory._access], 1)[0] == ok
    ctypes.memset(a, 5, 1)
    assert ctypes.string_at(a + 2 * g, 1) == b"\5"
    d.cuMemRelease(h)
    assert d.used == 2 * g
    assert d.cuMemUnmap(a, 4 * g)[0] == bad  # two mappings at once
    assert d.cuMemUnmap(a, 2 * g)[0] == ok and d.cuMemUnmap(a + 2 * g, 2 * g)[0] == ok
    assert d.used == 0 and d.cuMemAddressFree(a, 4 * g)[0] == ok


def test_the_stand_in_faults_without_access(signal_of):
    d = FakeDriver()
    _, address = d.cuMemAddressReserve(d.granularity, 0, 0, 0)
    _, handle = d.cuMemCreate(d.granularity, device_memory(d)._properties, 0)
    assert d.cuMemMap(address, d.granularity, 0, handle, 0)[0] == d.error.CUDA_SUCCESS
    assert signal_of(lambda: ctypes.string_at(address, 1)) == signal.SIGSEGV
