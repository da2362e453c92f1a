# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls CUDA's driver. A failed call raises an exception that names it.

The functions of CUDA's runtime would leave a pending error behind, which torch would
report at its next call. The driver's functions do not.
"""

from typing import Any

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError


class DriverError(MoEPrefetchError):
    """The driver refused a call.

    Attributes:
        call: the function that was called.
        error: CUDA's name of the error, for example "CUDA_ERROR_OUT_OF_MEMORY".
    """

    def __init__(self, call: str, error: str, message: str | None = None):
        super().__init__(message or f"the CUDA driver refused {call}: {error}")
        self.call, self.error = call, error


class Driver:
    """The driver behind `module`, which is `cuda.bindings.driver` or a stand-in for
    it."""

    def __init__(self, module: Any):
        self.module = module

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls the driver's function `name`.

        Returns:
            What it returns beside the error: None, a value, or a tuple of values.

        Raises:
            DriverError: the call failed, or the driver has no such function.
        """
        try:
            error, *values = getattr(self.module, name)(*arguments)
        except (AttributeError, RuntimeError) as missing:
            # There is no driver, or it does not have the function.
            raise DriverError(name, str(missing)) from None
        if error != self.module.CUresult.CUDA_SUCCESS:
            _, text = self.module.cuGetErrorName(error)
            raise DriverError(name, text.decode() if text else f"error {int(error)}")
        return tuple(values) if len(values) > 1 else values[0] if values else None


def cuda_driver() -> Driver:
    """The driver of this machine.

    Raises:
        MoEPrefetchError: the package cuda-bindings is missing.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MoEPrefetchError(
            "--moe-gpu-prefetch needs the package cuda-bindings on a GPU, and it "
            f"cannot be imported ({error}). Install it: pip install "
            "'cuda-bindings>=12.9,<14'."
        ) from None
    return Driver(driver)
