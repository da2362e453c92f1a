# SPDX-License-Identifier: Apache-2.0
"""The layer seam: a `RoutedExperts` whose parameters are slots over experts in host memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu_experts import (
    CPU_EXPERTS_CLASSES,
    slotted_cpu_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import (
    ExpertStore,
    per_expert_parameters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.load_coverage import LoadCoverage
from vllm.model_executor.layers.fused_moe.expert_slots.manager import ExpertSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.pinning import pin, pinned
from vllm.model_executor.layers.fused_moe.expert_slots.rank_map import RankMap
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import SharedStore
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import current as shared_store
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers
from vllm.model_executor.layers.fused_moe.expert_slots.versions import keep_routing_apart

logger = init_logger(__name__)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts as _Layer

    from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
else:
    _Layer = object


_loading_draft: ContextVar[bool] = ContextVar("_loading_draft", default=False)


@contextmanager
def building(draft: bool) -> Iterator[None]:
    """Within, the layers that are built belong to a draft model, or to the model itself."""
    token = _loading_draft.set(draft)
    try:
        yield
    finally:
        _loading_draft.reset(token)


class ExpertSlotsMixin(_Layer):
    """Turns a `RoutedExperts`, stock's or a model's own, into slots over a host store.

    The stock class creates, loads and processes all experts in host memory; the step that follows
    (`_process_then_make_slots`) keeps them as the store and shrinks the parameters to the slots.

    Attributes:
        slots: the layer's manager, None until its weights have been processed.
        slots_config: what was asked for, None where nothing was.
        num_slots: slots of this layer, at least its top-k.
        load_coverage: what the checkpoint brought, None where the layer has no slots.
        shared_store: the store that is being built or attached, while loading.
        slotted_kernel: stock's kernel object, its class one of ours.
    """

    slots: "ExpertSlotManager | DeviceSlotManager | None" = None
    load_coverage: LoadCoverage | None = None
    shared_store: SharedStore | None = None

    def adopt_expert_slots(self) -> None:
        """Arms a layer that stock code has just constructed; its weights are still empty.

        Raises:
            MoEPrefetchError: this layer cannot be slotted.
        """
        self.slots_config = MoEPrefetchConfig.from_additional_config(
            get_current_vllm_config().additional_config
        )
        if self.slots_config is None:
            return
        asked = self.slots_config.slots_of(draft=_loading_draft.get())
        if asked == "auto":
            raise MoEPrefetchError(
                "--moe-gpu-prefetch auto was not settled: this engine's configuration was not made "
                "by EngineArgs, or only its draft has MoE layers. Give a number."
            )
        self.num_slots = max(asked, self.top_k)
        if self.num_slots > asked:
            logger.warning_once(
                "--moe-gpu-prefetch %d is below the router's top-k; raised to %d slots per layer.",
                asked,
                self.num_slots,
            )
        if self.num_slots >= self.local_num_experts:
            logger.info_once(
                "--moe-gpu-prefetch %d covers all %d experts of a layer: full residency, nothing "
                "is offloaded.",
                asked,
                self.local_num_experts,
            )
            return
        self._refuse_unless_slottable()
        self.load_coverage = LoadCoverage(self, get_current_vllm_config().load_config.load_format)
        self.shared_store = shared_store()
        if current_platform.is_cuda():
            from vllm.model_executor.layers.fused_moe.expert_slots.experts import (
                SlottedTritonExperts,
            )

            self.quant_method.experts_cls = SlottedTritonExperts
        else:
            self.quant_method.experts_cls = slotted_cpu_experts(self.quant_method.experts_cls)
        self._process_weights = self.quant_method.process_weights_after_loading
        self.quant_method.process_weights_after_loading = self._process_then_make_slots
        self.quant_method.requires_device_loading = False
        for parameter in self.parameters(recurse=False):
            if getattr(getattr(parameter, "weight_loader", None), "__self__", None) is self:
                parameter.weight_loader = self.weight_loader

    @property
    def awaits_slots(self) -> bool:
        """Whether the layer was armed and its weights have not been processed since."""
        return self.load_coverage is not None and self.slots is None

    def _refuse_unless_slottable(self) -> None:
        # The parallel ones are in `conflicts.py` too: VLLM_DP_SIZE and a VllmConfig that is made
        # without EngineArgs go past it.
        parallel = self.moe_config.moe_parallel_config
        experts_cls = getattr(self.quant_method, "experts_cls", None)
        experts_name = getattr(experts_cls, "__name__", type(self.quant_method).__name__)
        reason = None
        if not (current_platform.is_cpu() or current_platform.is_cuda()):
            reason = (
                f"expert slots run on CUDA and on the CPU, not on {current_platform.device_name}"
            )
        elif parallel.dp_size > 1 or parallel.pcp_size > 1:
            reason = "ranks of data or prefill context parallelism hand each other their tokens; "
            reason += "use tensor parallelism"
        elif parallel.use_ep and current_platform.is_cpu():
            reason = "stock's CPU kernels take no expert map; drop --enable-expert-parallel"
        elif parallel.enable_eplb:
            reason = "EPLB moves experts between ranks; drop --enable-eplb"
        elif self.moe_config.is_lora_enabled:
            reason = "LoRA adapters are indexed by expert id; drop --enable-lora"
        elif (
            isinstance(self.quant_method, UnquantizedFusedMoEMethod)
            and type(self.quant_method) is not UnquantizedFusedMoEMethod
        ):
            method = type(self.quant_method)
            reason = f"its method is {method.__module__}.{method.__qualname__}, which stands in "
            reason += "for stock's; disable that plugin with VLLM_PLUGINS"
        elif current_platform.is_cpu() and experts_name not in CPU_EXPERTS_CLASSES:
            reason = f"its kernel {experts_name} is not known to run on remapped expert ids"
        elif current_platform.is_cuda() and not (
            experts_name == "TritonExperts"
            and isinstance(self.quant_method, UnquantizedFusedMoEMethod)
        ):
            reason = f"its kernel is {experts_name} of {type(self.quant_method).__name__}; slots "
            reason += "on a GPU serve unquantised experts with --moe-backend triton"
        if reason:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch cannot serve layer {self.layer_name} "
                f"({type(self).__name__}): {reason}. Or serve without --moe-gpu-prefetch."
            )

    def weight_loader(self, param: Any, *args: Any, **kwargs: Any) -> Any:
        if self.slots is not None:
            raise MoEPrefetchError(
                f"{self.layer_name}: weights cannot be reloaded into expert slots; restart the "
                "engine to serve other weights."
            )
        loaded = True
        if self.shared_store is None or not self.shared_store.ready:
            loaded = super().weight_loader(param, *args, **kwargs)
        if self.load_coverage is not None:
            self.load_coverage.record(param, *args, **kwargs)
        return loaded

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.slots is not None:
            raise MoEPrefetchError(
                f"{self.layer_name} holds {self.num_slots} of {self.local_num_experts} experts, so "
                "its parameters are not the model's. Save from an engine without "
                "--moe-gpu-prefetch."
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _process_then_make_slots(self, layer: torch.nn.Module) -> None:
        assert self.slots_config is not None
        parameters = per_expert_parameters(layer, self.local_num_experts)
        attached = self.shared_store is not None and self.shared_store.ready
        if attached:
            # The store holds processed experts; stock's processing, on one, builds the kernel.
            for parameter in parameters.values():
                parameter.data = parameter.data[:1].clone()
        self._process_weights(layer)
        rows = 1 if attached else self.local_num_experts
        parameters = per_expert_parameters(layer, rows, only=set(parameters))
        store = ExpertStore(self._home({name: p.data for name, p in parameters.items()}))
        buffers = SlotBuffers(parameters, store, self.num_slots, self.moe_config.device)
        manager = manager_class()(
            self.slots_config, buffers, self.layer_name, get_world_group().rank
        )
        self.slotted_kernel = self.quant_method.moe_kernel.fused_experts
        self.slotted_kernel.slots = manager
        if current_platform.is_cpu():
            self.slotted_kernel.layer = self
        elif self.expert_map is not None:
            self.slotted_kernel.rank_map = RankMap(self.expert_map)
        self.slots = manager
        self.shared_store = None

    def _home(self, processed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The experts in the memory where they stay: the shared store, or this process's own."""
        cuda = current_platform.is_cuda()
        if self.shared_store is None:
            return {name: pinned(t) if cuda else t for name, t in processed.items()}
        if self.shared_store.ready:
            tensors = self.shared_store.attach(self.layer_name)
            for name, row in processed.items():
                if tensors[name].shape[1:] != row.shape[1:] or tensors[name].dtype != row.dtype:
                    raise MoEPrefetchError(
                        f"the shared store holds {self.layer_name}.{name} as rows of "
                        f"{tuple(tensors[name].shape[1:])} {tensors[name].dtype}, this model needs "
                        f"{tuple(row.shape[1:])} {row.dtype}. Remove it with vllm-moe-prefetch "
                        "stores DIRECTORY --remove."
                    )
        else:
            tensors = self.shared_store.add(self.layer_name, processed)
        for tensor in tensors.values() if cuda else ():
            pin(tensor, read_only=True)
        return tensors


class SlottedRoutedExperts(ExpertSlotsMixin, RoutedExperts):
    """Stands in for stock's `RoutedExperts`; acts as stock where no slots were asked for."""

    def __init__(
        self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args: Any, **kwargs: Any
    ):
        if _slots_wanted():
            keep_routing_apart(moe_config)
            if current_platform.is_cuda() and moe_config.moe_backend == "auto":
                moe_config.moe_backend = "triton"
            # Experts are created in host memory; the full set never exists on the device.
            with torch.device("cpu"):
                super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)
        else:
            super().__init__(layer_name, params_dtype, moe_config, *args, **kwargs)
        self.adopt_expert_slots()


def manager_class() -> "type[ExpertSlotManager] | type[DeviceSlotManager]":
    """Who decides on this platform: kernels on CUDA, the reference elsewhere."""
    if not current_platform.is_cuda():
        return ExpertSlotManager
    from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager

    return DeviceSlotManager


def _slots_wanted() -> bool:
    config = get_current_vllm_config().additional_config
    return MoEPrefetchConfig.from_additional_config(config) is not None


def slotted(routed_experts: RoutedExperts) -> None:
    """Gives slots to a layer whose model brings its own `RoutedExperts` subclass.

    Raises:
        MoEPrefetchError: the class changes expert ids itself, after the slots would have.
    """
    cls = type(routed_experts)
    if not isinstance(routed_experts, ExpertSlotsMixin) and _slots_wanted():
        if cls.forward_modular is not RoutedExperts.forward_modular:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch cannot serve layer {routed_experts.layer_name}: "
                f"{cls.__module__}.{cls.__name__} works on the router's choices in a "
                "forward_modular of its own. Serve this model without --moe-gpu-prefetch."
            )
        routed_experts.__class__ = type(f"Slotted{cls.__name__}", (ExpertSlotsMixin, cls), {})
        routed_experts.adopt_expert_slots()
