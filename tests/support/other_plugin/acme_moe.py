# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Another plugin, as real as ours: vLLM finds it through its entry point. It
does what the environment's ACME lists: names of functions below."""

import functools
import inspect
import os
import sys


def register():
    for name in filter(None, os.environ.get("ACME", "").split(",")):
        globals()[name]()


def _register_oot(module, name):
    from vllm.model_executor.custom_op import PluggableLayer

    stock = getattr(__import__(module, fromlist=[name]), name)
    cls = type(f"Acme{name}", (stock,), {"__module__": __name__})
    PluggableLayer.register_oot(cls, name=name)


def layer():
    _register_oot(
        "vllm.model_executor.layers.fused_moe.routed_experts", "RoutedExperts"
    )


def runner():
    _register_oot("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner")


def transformers_runner():
    _register_oot(
        "vllm.model_executor.models.transformers.moe", "TransformersMoERunner"
    )


def _methods():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    for name in ("add_cli_args", "from_cli_args", "create_engine_config"):
        yield EngineArgs, name
    yield BaseModelLoader, "load_model"


def _replace(owner, name, make):
    before = inspect.getattr_static(owner, name)
    kind = (
        type(before) if isinstance(before, staticmethod | classmethod) else lambda f: f
    )
    setattr(owner, name, kind(make(getattr(before, "__func__", before))))


def _said(before, name):
    print(f"acme saw {name}", file=sys.stderr)
    return before


def chained():
    """Wraps everything that ours wraps, as one should."""
    for owner, name in _methods():

        def make(before, name=name):
            @functools.wraps(before)
            def acme_wrap(*args, **kwargs):
                return _said(before, name)(*args, **kwargs)

            return acme_wrap

        _replace(owner, name, make)


def unmarked():
    """The same without functools.wraps."""
    for owner, name in _methods():

        def make(before, name=name):
            def acme_unmarked(*args, **kwargs):
                return _said(before, name)(*args, **kwargs)

            return acme_unmarked

        _replace(owner, name, make)


def _sever(index):
    """Calls stock directly, past every wrap that was there before."""
    owner, name = list(_methods())[index]

    def make(before):
        stock = inspect.unwrap(before)

        def acme_severs(*args, **kwargs):
            return stock(*args, **kwargs)

        return acme_severs

    _replace(owner, name, make)


severed_from_cli_args = functools.partial(_sever, 1)
severed_create_engine_config = functools.partial(_sever, 2)
severed_load_model = functools.partial(_sever, 3)


def processing():
    """Wraps the processing of weights on the class, as one should."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    def make(before):
        @functools.wraps(before)
        def acme_processing(*args):
            return _said(before, "processing")(*args)

        return acme_processing

    _replace(UnquantizedFusedMoEMethod, "process_weights_after_loading", make)


def severed_processing():
    """Has the loader call the class's method, past what the layer's own instance
    has."""
    from vllm.model_executor.model_loader import base_loader

    def acme_processes(model, model_config, target_device):
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if hasattr(method, "process_weights_after_loading"):
                type(method).process_weights_after_loading(method, module)
            elif "Attention" in type(module).__name__ and hasattr(module, "impl"):
                module.process_weights_after_loading(model_config.dtype)

    base_loader.process_weights_after_loading = acme_processes


def takes_over_while_loading():
    """Puts its classes in the registry by force, once a model is being loaded."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    def make(before):
        @functools.wraps(before)
        def acme_takes_over(*args, **kwargs):
            for stock in (RoutedExperts, MoERunner):
                cls = type(f"Acme{stock.__name__}", (stock,), {"__module__": __name__})
                op_registry_oot[stock.__name__] = cls
            return before(*args, **kwargs)

        return acme_takes_over

    _replace(BaseModelLoader, "load_model", make)


def loader():
    """A load format whose class loads models in a way of its own."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    @register_model_loader("acme")
    class AcmeLoader(DefaultModelLoader):
        def load_model(self, *args, **kwargs):
            raise AssertionError("not to be reached")


def same_flag():
    """Has a flag of our name."""
    from vllm.engine.arg_utils import EngineArgs

    def make(before):
        @functools.wraps(before)
        def acme_flag(parser):
            parser.add_argument("--moe-gpu-prefetch", default=None)
            return before(parser)

        return acme_flag

    _replace(EngineArgs, "add_cli_args", make)
