# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`register()` does all of its work or none, and never ends vLLM's start: on a version
that is not supported, and on one that was changed."""

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    OPTIONS_KEY,
    SLOTS_KEY,
)
from vllm.plugins.moe_gpu_prefetch.stock.unsupported import _FLAGS

START = "load_general_plugins()\n"
WRAPPED = (
    "['vllm.engine.arg_utils:EngineArgs.add_cli_args', "
    "'vllm.engine.arg_utils:EngineArgs.create_engine_config', "
    "'vllm.engine.arg_utils:EngineArgs.from_cli_args', "
    "'vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model', "
    "'vllm.v1.engine.utils:wait_for_engine_startup', "
    "'vllm.v1.executor.abstract:Executor.__init__']"
)
REFUSING = (
    "['vllm.engine.arg_utils:EngineArgs.add_cli_args', "
    "'vllm.engine.arg_utils:EngineArgs.create_engine_config']"
)
OUR_MODULES = (
    "import sys\n"
    "ours = [m for m in sys.modules if '.moe_gpu_prefetch' in m or '.expert_slots' in "
    "m]\n"
    "names = {m.partition('moe_gpu_prefetch')[2] for m in ours}\n"
    "print(sorted(n for n in names if '.seam' not in n and '.table.' not in n))"
)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0"])
def test_an_unsupported_vllm_is_left_alone(fresh, version):
    """Nothing is wrapped but the parser, which refuses the flag, and the one method
    that scripts pass; nothing is imported that could fail there."""
    unsupported = f"vllm.__version__ = '{version}'\n"
    assert (
        f"{REFUSING}\n"
        in fresh(f"{unsupported}print(touched(load_general_plugins))").output
    )
    loaded = fresh(unsupported + START + OUR_MODULES).output
    assert loaded.endswith("['', '.stock', '.stock.table', '.stock.unsupported']\n")


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0"])
def test_an_unsupported_vllm_refuses_the_flag_and_serves_without_it(
    fresh, checkpoint, version
):
    """On the command line and in scripts, with the version and the range."""
    start = f"vllm.__version__ = '{version}'\n{START}model = {str(checkpoint)!r}\n"
    message = f"expert slots support vLLM <0.34,>=0.32, and {version} is installed"
    flag = fresh(f"{start}parse(model, '--moe-gpu-prefetch', '8')")
    assert (
        flag.status == 2 and message in flag.output and "Traceback" not in flag.output
    )
    options = fresh(f"{start}parse(model, '--moe-gpu-prefetch-config.policy', 'lfu')")
    assert options.status == 2 and message in options.output
    script = fresh(f"{start}ask(model)")
    assert script.status == 1 and f"ValueError: {message}" in script.output
    without = fresh(
        f"{start}print(parse(model).create_engine_config().additional_config)"
    )
    assert (
        without.status == 0
        and without.output.endswith("{}\n")
        and message not in without.output
    )


def test_a_supported_vllm_is_wrapped_and_keeps_its_layer_classes(fresh):
    """The registry stays free for others until slots are asked for."""
    assert f"{WRAPPED}\n" in fresh("print(touched(load_general_plugins))").output


CHANGED = {
    "a parameter of a wrapped method": (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "EngineArgs.from_cli_args = classmethod(lambda cls, namespace: stock(cls, "
        "namespace))\n",
        "EngineArgs.from_cli_args no longer accepts args.",
    ),
    "a wrapped method": (
        "from vllm.model_executor.model_loader.base_loader import BaseModelLoader as "
        "B\n"
        "B.load_a_model = B.load_model; del B.load_model\n",
        "load_model",
    ),
    "a name that is imported": (
        "import vllm.config.utils as utils\nutils.docs_of = utils.get_attr_docs\n"
        "del utils.get_attr_docs\n",
        "get_attr_docs",
    ),
    "a name that only slots need": (
        "import vllm.utils.torch_utils as t\ndel t._encode_layer_name\n",
        "vllm.utils.torch_utils:_encode_layer_name cannot be used (module",
    ),
    "a parameter that only slots need": (
        "import vllm.model_executor.model_loader.utils as utils\n"
        "utils.initialize_model = lambda vllm_config: None\n",
        "initialize_model no longer accepts model_config.",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_vllm_refuses_the_flag_by_the_seam(fresh, checkpoint, change):
    """All or nothing: with the flag the start is refused, naming the seam."""
    code, named = CHANGED[change]
    result = fresh(
        f"{code}{START}parse({str(checkpoint)!r}, '--moe-gpu-prefetch', '8')"
    )
    assert result.status == 2, result.output
    assert (
        " differs from the released one: " in result.output and named in result.output
    )
    assert "Traceback" not in result.output


@pytest.mark.parametrize("change", list(CHANGED)[:3])
def test_a_changed_vllm_is_wrapped_in_nothing_else(fresh, change):
    """Of the wraps that every process gets, none is there if one cannot be."""
    code, _ = CHANGED[change]
    code += (
        f"{START}from vllm.plugins.moe_gpu_prefetch.stock import wrapping\n"
        "print(wrapping._installed)"
    )
    result = fresh(code)
    assert result.status == 0 and result.output.endswith("[]\n"), result.output


@pytest.mark.parametrize("change", ["a wrapped method", "a name that only slots need"])
def test_a_changed_vllm_works_as_stock_without_the_flag(fresh, checkpoint, change):
    """Nothing is said, the arguments are stock's."""
    code, _ = CHANGED[change]
    result = fresh(
        f"{code}{START}config = parse({str(checkpoint)!r}).create_engine_config()\n"
        "print(config.model_config.dtype, config.additional_config)"
    )
    assert result.status == 0, result.output
    assert result.output.endswith("torch.bfloat16 {}\n"), result.output
    assert "expert slots" not in result.output


@pytest.mark.parametrize("version", ["0.32.0", "0.34.0"])
def test_a_parser_that_does_not_take_the_flag_costs_one_line(
    fresh, checkpoint, version
):
    """Another plugin has a flag of that name: vLLM starts, and the log says that ours
    is missing."""
    code = f"vllm.__version__ = '{version}'\n{START}"
    result = fresh(
        f"{code}print(parse({str(checkpoint)!r}).seed)", acme="same_flag", order="after"
    )
    assert result.status == 0 and result.output.endswith("0\n"), result.output
    assert result.output.count("--moe-gpu-prefetch is not available") == 1


def test_without_what_the_flag_needs_vllm_still_starts(fresh):
    """EngineArgs has another shape altogether."""
    code = (
        "vllm.__version__ = '0.40.0'\nfrom vllm.engine.arg_utils import EngineArgs\n"
        f"del EngineArgs.add_cli_args\n{START}print('started')"
    )
    result = fresh(code)
    assert result.status == 0 and result.output.endswith("started\n")
    assert (
        result.output.count(
            "--moe-gpu-prefetch is not available: expert slots support vLLM"
        )
        == 1
    )


def test_the_flag_has_the_same_names_on_an_unsupported_vllm():
    """The module with them cannot import the configuration's."""
    assert _FLAGS == (SLOTS_KEY, OPTIONS_KEY)


def test_the_plan_command_refuses_an_unsupported_vllm_too(fresh, checkpoint):
    """One line, no table that would not hold."""
    code = (
        "vllm.__version__ = '0.34.0'\nimport sys\n"
        f"sys.argv = ['vllm-moe-prefetch', 'plan', {str(checkpoint)!r}]\n"
        "from vllm.plugins.moe_gpu_prefetch.command.main import main\nmain()"
    )
    result = fresh(code)
    assert (
        result.status == 2
        and "support vLLM <0.34,>=0.32, and 0.34.0 is installed" in result.output
    )
