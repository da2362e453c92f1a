# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The seam to vLLM's layer: a `RoutedExperts` whose parameters are rows, with its
experts in host memory."""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm.model_executor.layers.fused_moe.expert_slots.backend import (
    Backend,
    SlotManager,
    current_backend,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchError,
    clamp,
)
from vllm.model_executor.layers.fused_moe.expert_slots.model_load import (
    ModelLoad,
    current_load,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    cannot_serve,
    configs_among,
    layer_objection,
    runner_objection,
    top_k_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    SharedStore,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import (
    LoadCoverage,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
    pages_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import (
    ExpertStore,
    per_expert_parameters,
)

logger = init_logger(__name__)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import (
        RoutedExperts as _Layer,
    )
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import (
        MoERunner as _Runner,
    )
else:
    _Layer = _Runner = object


def slotted_layers(layers: Any) -> list[Any]:
    """The layers with slots among `layers`, modules of vLLM's static forward context or
    of a model."""
    experts = [getattr(layer, "routed_experts", layer) for layer in layers]
    slotted = [
        layer for layer in experts if getattr(layer, "slot_manager", None) is not None
    ]
    return list(dict.fromkeys(slotted))


def _slots_for(load: ModelLoad, moe_config: FusedMoEConfig) -> int | None:
    """The slots of a layer that is about to be built; None if it is to be stock's.

    Raises:
        MoEPrefetchError: what was asked for is still `auto` or a size.
    """
    asked = load.config.slots_of(load.draft)
    if not isinstance(asked, int):
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {asked} is still 'auto' or a size: this engine's "
            "configuration was not made by EngineArgs, or only its draft has MoE "
            "layers. Give a number."
        )
    if reason := top_k_objection(moe_config):
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {asked} cannot serve this model: {reason}."
        )
    experts = moe_config.num_local_experts
    slots = clamp(asked, moe_config.experts_per_token, experts)
    if slots == experts:
        logger.info_once(
            "--moe-gpu-prefetch %d covers all %d experts of a layer: full residency, "
            "nothing is offloaded.",
            asked,
            experts,
        )
        return None
    if slots > asked:
        logger.warning_once(
            "--moe-gpu-prefetch %d is below the router's top-k; raised to %d slots per "
            "layer.",
            asked,
            slots,
        )
    return slots


class ExpertSlotsMixin(_Layer):
    """Turns a `RoutedExperts`, stock's or a model's own, into rows over a host store.

    Whether a layer gets slots is decided before stock builds it. A layer without slots
    is stock's, unchanged. A layer with slots is created, loaded and processed in host
    memory, so that its experts are never all on the device. Then
    (`_process_then_make_slots`) its experts stay in host memory as the store, and the
    parameters become rows.

    Attributes:
        slot_manager: the layer's manager, None until its weights have been processed.
        slots_config: what was asked for.
        num_slots: N, at least the layer's top-k; None if the layer has no slots.
        load_coverage: what the checkpoint brought; None if the layer has no slots.
        shared_store: while loading, the store that is built or attached.
    """

    slot_manager: SlotManager | None = None
    num_slots: int | None = None
    load_coverage: LoadCoverage | None = None
    shared_store: SharedStore | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        moe_config, quant_config = configs_among(*args, *kwargs.values())
        load = current_load()
        slots = _slots_for(load, moe_config) if load is not None else None
        if load is None or slots is None:
            super().__init__(*args, **kwargs)
            return
        backend = current_backend()
        backend.prepare(moe_config, quant_config)
        with torch.device("cpu"):
            super().__init__(*args, **kwargs)
        self.slots_config, self.num_slots = load.config, slots
        self.shared_store = load.store
        self._adopt(backend)

    def _adopt(self, backend: Backend) -> None:
        """Prepares a layer that stock's code has just built, with empty weights.

        Raises:
            MoEPrefetchError: this layer cannot have slots.
        """
        if reason := layer_objection(self, backend):
            raise cannot_serve(self.layer_name, self, reason)
        self._backend = backend
        self.load_coverage = LoadCoverage(
            self, get_current_vllm_config().load_config.load_format
        )
        method: Any = self.quant_method
        method.experts_cls = backend.slotted(method.experts_cls)
        self._process_weights = self.quant_method.process_weights_after_loading
        method.process_weights_after_loading = self._process_then_make_slots
        self.quant_method.requires_device_loading = False
        self._memory = self._workers_memory()
        for parameter in self.parameters(recurse=False):
            # Stock's parameters in host memory are empty yet. Those on the device are
            # the router's.
            if backend.pins and parameter.device.type == "cpu":
                parameter.data = host_tensor(parameter.shape, parameter.dtype)
            if (
                getattr(getattr(parameter, "weight_loader", None), "__self__", None)
                is self
            ):
                loaded: Any = parameter
                loaded.weight_loader = self.weight_loader

    @property
    def routed(self) -> float:
        """How many of this rank's experts a token is expected to need: the rank's share
        of the top-k."""
        return self.top_k * self.local_num_experts / self.global_num_experts

    @property
    def awaits_slots(self) -> bool:
        """Whether the layer will have slots once its weights have been processed."""
        return self.load_coverage is not None and self.slot_manager is None

    def weight_loader(self, param: Any, *args: Any, **kwargs: Any) -> Any:
        if self.slot_manager is not None:
            raise MoEPrefetchError(
                f"{self.layer_name}: weights cannot be reloaded into expert slots; "
                "restart the engine to serve other weights."
            )
        if self.load_coverage is not None:
            self.load_coverage.check_shape(param, *args, **kwargs)
        if self.shared_store is not None and self.shared_store.ready:
            return True
        return super().weight_loader(param, *args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.slot_manager is not None:
            raise MoEPrefetchError(
                f"{self.layer_name} holds {self.num_slots} of "
                f"{self.local_num_experts} experts, so its parameters are not the "
                "model's. Save from an engine without --moe-gpu-prefetch."
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _process_then_make_slots(self, layer: torch.nn.Module) -> None:
        assert self.num_slots is not None
        parameters = per_expert_parameters(layer, self.local_num_experts)
        attached = self.shared_store is not None and self.shared_store.ready
        if attached:
            # The store holds processed experts. Stock's processing of one expert builds
            # the kernel.
            for parameter in parameters.values():
                parameter.data = parameter.data[:1].clone()
        self._process_weights(layer)
        shown = 1 if attached else self.local_num_experts
        parameters = per_expert_parameters(layer, shown, only=set(parameters))
        device = self.moe_config.device
        for name, other in layer.named_parameters(recurse=False):
            if name not in parameters:
                other.data = other.data.to(device)
        store = ExpertStore(
            self._home({name: p.data for name, p in parameters.items()})
        )
        memory = self._memory
        if self.shared_store is not None:
            for tensor in store.tensors.values():
                memory.pin(tensor, read_only=True)
        rows = ExpertRows(parameters, store, self.num_slots, memory)
        manager = self._backend.manager(
            self.slots_config, rows, self, get_world_group().rank
        )
        method: Any = self.quant_method
        method.moe_kernel.fused_experts.slot_manager = manager
        self.slot_manager = manager
        self.shared_store = None

    def _workers_memory(self) -> Memory:
        """The memory of this worker's rows, which all its layers share, drafts
        included. The first layer makes it.

        Raises:
            MoEPrefetchError: the device has no such memory. No weight has been read
                yet.
        """
        static = get_current_vllm_config().compilation_config.static_forward_context
        for module in static.values():
            layer = getattr(module, "routed_experts", module)
            if getattr(layer, "load_coverage", None) is not None:
                return layer._memory
        return self._backend.memory(torch.device(self.moe_config.device))

    def _home(self, processed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The host tensors that become the store: the shared store's mapping, or this
        process's pages."""
        if self.shared_store is None:
            pins = self._backend.pins
            return {name: _own_pages(t) if pins else t for name, t in processed.items()}
        if not self.shared_store.ready:
            return self.shared_store.add(self.layer_name, processed)
        tensors = self.shared_store.attach(self.layer_name)
        for name, row in processed.items():
            if (
                tensors[name].shape[1:] != row.shape[1:]
                or tensors[name].dtype != row.dtype
            ):
                raise MoEPrefetchError(
                    f"the shared store holds {self.layer_name}.{name} as rows of "
                    f"{tuple(tensors[name].shape[1:])} {tensors[name].dtype}, this "
                    f"model needs {tuple(row.shape[1:])} {row.dtype}. Remove it with "
                    "vllm-moe-prefetch stores DIRECTORY --remove."
                )
        return tensors


def _own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it if it shares pages with other memory."""
    pages = pages_of(tensor)
    if pages is not None and tensor.is_contiguous() and pages.size == tensor.nbytes:
        return tensor
    return host_tensor(tensor.shape, tensor.dtype).copy_(tensor)


class CheckedMoERunner(_Runner):
    """Refuses slots if a model has a runner of its own: the runner may read the
    experts' weights by expert ids, and rows are not ids. Stock's runner and that of the
    transformers backend do not."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        layer = self.routed_experts
        if getattr(layer, "num_slots", None) and (reason := runner_objection(self)):
            raise cannot_serve(layer.layer_name, self, reason)


def slotted_class(stock: type) -> type:
    """A subclass of `stock`, a `RoutedExperts` or `MoERunner` class, with our mixin."""
    mixin: type
    if issubclass(stock, RoutedExperts):
        name, mixin = f"Slotted{stock.__name__}", ExpertSlotsMixin
    else:
        name, mixin = f"Checked{stock.__name__}", CheckedMoERunner
    return type(name, (mixin, stock), {"__module__": __name__})
