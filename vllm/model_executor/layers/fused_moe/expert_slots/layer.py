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
    on_rows,
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
    layer_objection,
    moe_config_among,
    runner_objection,
    top_k_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    SharedStore,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    WEIGHTS,
    Bundle,
    few_experts,
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import (
    LoadCoverage,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.homes import (
    check_stored,
    own_pages,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import (
    process_in_parts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore

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
        moe_config = moe_config_among(*args, *kwargs.values())
        load = current_load()
        slots = _slots_for(load, moe_config) if load is not None else None
        if load is None or slots is None:
            super().__init__(*args, **kwargs)
            return
        backend = current_backend()
        with backend.choosing_kernels(moe_config), torch.device("cpu"):
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
        self._process_weights = self.quant_method.process_weights_after_loading
        method.process_weights_after_loading = self._process_then_make_slots
        self.quant_method.requires_device_loading = False
        self._memory = self._workers_memory()
        if backend.pins:
            for name, parameter in parameters_of_experts(self).items():
                stock = parameter.data
                parameter.data = host_tensor(stock.shape, stock.dtype)
                if not name.endswith(WEIGHTS):
                    # Scales and biases have the values of what a checkpoint lacks.
                    parameter.data.copy_(stock)
        for parameter in self.parameters(recurse=False):
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

    # Models ask it of the function.
    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]

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
        shared, memory = self.shared_store, self._memory
        stored = (
            shared.attach(self.layer_name)
            if shared is not None and shared.ready
            else None
        )
        if stored is None:
            bundle, homes = self._processed()
            layer_wide = bundle.values()
            if shared is not None:
                mapped = shared.add(self.layer_name, homes | layer_wide)
                homes = {name: mapped[name] for name in homes}
            elif self._backend.pins:
                homes = own_pages(homes)
        else:
            bundle = self._processed_few(stored)
            check_stored(stored, bundle, self.layer_name)
            homes = {name: stored[name] for name in bundle.experts}
            layer_wide = {name: stored[name].clone() for name in bundle.values()}
        store = ExpertStore(homes)
        if shared is not None:
            for tensor in homes.values():
                memory.pin(tensor, read_only=True)
        device = self.moe_config.device
        layer_wide = {name: value.to(device) for name, value in layer_wide.items()}
        bundle.set_values(layer_wide, self.local_num_experts)
        rows = ExpertRows(store, self.num_slots, memory)
        bundle.set_rows(layer, rows.tensors)
        for name, parameter in layer.named_parameters(recurse=False):
            if name not in bundle.experts:  # the router's
                parameter.data = parameter.data.to(device)
        self._use(rows)
        self.shared_store = None

    @property
    def _processing_device(self) -> torch.device:
        on_device = self._backend.processes_on_device(self)
        return torch.device(self.moe_config.device if on_device else "cpu")

    def _processed(self) -> tuple[Bundle, dict[str, torch.Tensor]]:
        """Has stock process the experts that were read.

        Returns:
            The layer's tensors, and those of all its experts: [E, ...] each.
        """
        if self._backend.processes_on_device(self):
            return process_in_parts(
                self, self._process_weights, self._processing_device
            )
        self._process_weights(self)
        bundle = Bundle.of(self, self.local_num_experts)
        return bundle, bundle.tensors()

    def _processed_few(self, stored: dict[str, torch.Tensor]) -> Bundle:
        """Has stock process a few experts, for its kernel: those of the layer are
        `stored` as they were processed once."""
        # What stock notes while it reads biases.
        biases: Any = self._loaded_expert_biases
        biases.update(name for name in stored if name.endswith("_bias"))
        with few_experts(self, self._processing_device):
            self._process_weights(self)
        return Bundle.of(self, FEW)

    def _use(self, rows: ExpertRows) -> None:
        """Lets stock's kernel, which has just been made, run on `rows`.

        Raises:
            MoEPrefetchError: it is not one that slots can serve.
        """
        method: Any = self.quant_method
        stock = getattr(method.moe_kernel, "fused_experts", None)
        slotted = self._backend.slotted(type(stock))
        if slotted is None:
            raise cannot_serve(
                self.layer_name,
                self,
                f"{type(method).__name__} runs it with {type(stock).__name__}",
            )
        manager = self._backend.manager(
            self.slots_config, rows, self, get_world_group().rank
        )
        experts = on_rows(stock, slotted, manager)
        experts.layer = self
        method.moe_kernel.impl.fused_experts = experts
        self.slot_manager = manager

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
