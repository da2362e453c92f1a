# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a GPU's worker gives the kernels: memory of the driver's, and addresses that it
mapped."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.fake_driver import FakeDriver
from tests.support.pair import make_rows, make_store
from vllm.model_executor.layers.fused_moe.expert_slots.capacity import host_memory
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    backend,
    gather_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import Driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory
from vllm.model_executor.layers.fused_moe.expert_slots.weights import homes
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
    pages_of,
)
from vllm.plugins.moe_gpu_prefetch import guard
from vllm.plugins.moe_gpu_prefetch.stock import wrapping


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_memory_is_the_drivers(monkeypatch, device):
    """Of the device named, or of the current one; it reclaims what torch caches,
    once."""
    fake, emptied = FakeDriver(), []
    monkeypatch.setattr(host_memory, "is_pin_memory_available", lambda: True)
    monkeypatch.setattr(backend, "cuda_driver", lambda: Driver(fake))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: fake.capturing
    )
    memory = backend.CudaBackend().memory(torch.device(device))
    assert isinstance(memory, DeviceMemory) and memory.torch_device == torch.device(
        "cuda:0"
    )
    rows = [memory.rows("w", 8, 6, 1 << 16)]
    fake.total = fake.used
    with pytest.raises(Exception, match="no 131,072 bytes left"):
        memory.rows("w", 8, 6, 1 << 16)
    assert emptied == [1]
    fake.capturing = True
    rows.clear()
    assert fake.mappings and not fake.spoilt
    fake.capturing = False
    memory.sweep()
    assert not fake.mappings


def test_without_pinned_memory_a_layer_is_refused_first(monkeypatch):
    """As under WSL2, where stock pins nothing unless it is told to. The driver is not
    asked."""

    def never():
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(backend, "cuda_driver", never)
    monkeypatch.setattr(host_memory, "is_pin_memory_available", lambda: False)
    with pytest.raises(
        MoEPrefetchError, match=r"^--moe-gpu-prefetch: .*WSL2_ENABLE_PIN_MEMORY=1"
    ):
        backend.CudaBackend().memory(torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("kernel", "scales", "on_device"),
    [
        ("TritonExperts", (4, 8, 2), False),  # blocks
        ("TritonExperts", (4, 256, 1), False),  # channels
        ("TritonExperts", (4, 2), True),  # requantised to one scale for both
        ("TritonExperts", (4,), True),
        ("MarlinExperts", (4, 8, 2), True),
        ("TritonWNA16Experts", (4, 8, 2), True),
    ],
)
def test_experts_go_to_the_gpu_where_stock_changes_them(kernel, scales, on_device):
    layer = torch.nn.Module()
    layer.local_num_experts = 4
    layer.w13_weight = torch.nn.Parameter(torch.ones(4, 256, 8))
    layer.w13_weight_scale = torch.nn.Parameter(torch.ones(scales))
    layer.quant_method = SimpleNamespace(experts_cls=type(kernel, (), {}))
    assert backend.CudaBackend().processes_on_device(layer) is on_device


class MappedElsewhere(CPUMemory):
    """Kernels reach what was pinned at another address than the host does."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def pin(self, tensor, read_only=False):
        self.seen[tensor.data_ptr()] = tensor.clone()
        return self.seen[tensor.data_ptr()].data_ptr()


def test_kernels_use_the_addresses_that_pinning_gave(monkeypatch):
    """Of every tensor of the store, and of the counters."""
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)
    memory, store = MappedElsewhere(), make_store(8)
    device = CudaSlotManager(MoEPrefetchConfig(slots=3), make_rows(store, 3, memory))
    expected = {name: home.clone() for name, home in store.tensors.items()}
    for home in store.tensors.values():
        home.zero_()
    rows = device.step(torch.tensor([[5, 6]], dtype=torch.int32))
    for name, tensor in device.rows.tensors.items():
        assert torch.equal(tensor[rows[0].long()], expected[name][[5, 6]])
    mirror = memory.seen[device.counters.tensor.data_ptr()]
    assert mirror.tolist() == device.totals.tolist() and mirror[0] == 1
    assert device.counters.steps == 0
    assert set(memory.seen) == {
        device.counters.tensor.data_ptr(),
        *(home.data_ptr() for home in store.tensors.values()),
    }


def test_experts_that_processing_moved_get_pages_of_their_own():
    """What already lies alone at the start of pages stays; a view of more, or of less,
    does not."""
    tensor = host_tensor((4, 6), torch.float32)
    assert homes.own_pages({"a": tensor})["a"] is tensor
    for other in (torch.arange(24.0).view(4, 6), tensor[:2]):
        own = homes.own_pages({"a": other})["a"]
        assert (
            pages_of(own) is not None and own is not other and torch.equal(own, other)
        )
        assert own.is_contiguous()


def test_warm_up_of_a_gpus_worker_is_undone(monkeypatch):
    """Once stock's warm-up has ended, whatever it did, every layer goes back to the
    start."""
    from vllm.v1.worker.gpu_worker import Worker

    events, installed = [], []
    monkeypatch.setattr(
        guard,
        "current_platform",
        SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True),
    )
    monkeypatch.setattr(
        Worker, "compile_or_warm_up_model", lambda self: events.append("warm-up")
    )
    monkeypatch.setattr(wrapping, "install", lambda *wraps: installed.extend(wraps))
    guard.guard_worker.__wrapped__()
    (wrap,) = [wrap for wrap in installed if wrap.name == "compile_or_warm_up_model"]
    assert wrap.owner is Worker
    manager = SimpleNamespace(reset=lambda start: events.append(("reset", start)))
    slotted = type("Slotted", (), {"slot_manager": manager, "layer_name": "a"})()
    modules = {"a": type("Runner", (), {"routed_experts": slotted})(), "b": object()}
    static = SimpleNamespace(static_forward_context=modules)
    asked = {"moe_gpu_prefetch": 8}
    config = SimpleNamespace(compilation_config=static, additional_config=asked)
    wrap.function(SimpleNamespace(vllm_config=config))
    assert events == ["warm-up", ("reset", None)]
