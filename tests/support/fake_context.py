# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The part of a stand-in for `cuda.bindings.driver` that is not memory: its names, the
current context, devices and errors.

Enumerations and structures are NVIDIA's own where the package is installed, so that a
wrong name or field fails here. Calls without a current context and calls that a graph
capture forbids are refused."""

from types import SimpleNamespace
from typing import Any

try:
    from cuda.bindings import driver as REAL
except ImportError:
    REAL = None

NAMES = {
    "CUresult": {
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_INVALID_DEVICE": 101,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_OPERATING_SYSTEM": 304,
        "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
        "CUDA_ERROR_NOT_SUPPORTED": 801,
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
        "CUDA_ERROR_UNKNOWN": 999,
    },
    "CUdevice_attribute": {
        "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 102
    },
    "CUmemAllocationType": {"CU_MEM_ALLOCATION_TYPE_PINNED": 1},
    "CUmemLocationType": {"CU_MEM_LOCATION_TYPE_DEVICE": 1},
    "CUmemAccess_flags": {"CU_MEM_ACCESS_FLAGS_PROT_READWRITE": 3},
    "CUmemAllocationGranularity_flags": {"CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0},
}


class FakeContext:
    """Contexts, devices and errors.

    Attributes:
        calls: the names of the calls so far that may be refused.
        capturing: a graph is captured; a test sets it.
        running: a kernel may still use the memory; a test sets it.
        spoilt: a call was made that the capture forbids.
    """

    CUresult: Any

    def __init__(self, devices: int = 1, supported: bool = True):
        self.devices, self.supported = devices, supported
        self.context, self.stack = 0xC0, []
        self.capturing = self.running = self.spoilt = False
        self.calls: list[str] = []
        for name, values in NAMES.items():
            setattr(
                self, name, getattr(REAL, name) if REAL else SimpleNamespace(**values)
            )
        self.error = self.CUresult

    def _structure(self, name):
        if REAL:
            return getattr(REAL, name)()
        return SimpleNamespace(
            location=SimpleNamespace(type=0, id=0),
            allocFlags=SimpleNamespace(
                compressionType=0, gpuDirectRDMACapable=0, usage=0
            ),
            requestedHandleTypes=0,
            type=0,
            id=0,
            flags=0,
        )

    def CUmemAllocationProp(self):
        return self._structure("CUmemAllocationProp")

    def CUmemAccessDesc(self):
        return self._structure("CUmemAccessDesc")

    def CUmemLocation(self):
        return self._structure("CUmemLocation")

    def _refuse(self, name: str, needs_context: bool = True):
        self.calls.append(name)
        if self.capturing:
            self.spoilt = True  # the capture is lost, as on hardware
            return self.error.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if needs_context and not self.context:
            return self.error.CUDA_ERROR_INVALID_CONTEXT
        return None

    def cuCtxGetCurrent(self):
        return self.error.CUDA_SUCCESS, self.context

    def cuCtxGetDevice(self):
        return (
            (self.error.CUDA_SUCCESS, 0)
            if self.context
            else (self.error.CUDA_ERROR_INVALID_CONTEXT, None)
        )

    def cuCtxPushCurrent(self, context):
        self.stack.append(self.context)
        self.context = context
        return (self.error.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        popped, self.context = self.context, self.stack.pop()
        return self.error.CUDA_SUCCESS, popped

    def cuCtxSynchronize(self):
        if error := self._refuse("cuCtxSynchronize"):
            return (error,)
        self.running = False
        return (self.error.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal):
        return (
            (self.error.CUDA_SUCCESS, ordinal)
            if ordinal < self.devices
            else (self.error.CUDA_ERROR_INVALID_DEVICE, 0)
        )

    def cuDeviceGetAttribute(self, attribute, device):
        assert int(attribute) == 102
        return self.error.CUDA_SUCCESS, int(self.supported)

    def cuGetErrorName(self, error):
        if REAL:
            return self.error.CUDA_SUCCESS, error.name.encode()
        return self.error.CUDA_SUCCESS, next(
            k for k, v in NAMES["CUresult"].items() if v == error
        ).encode()
