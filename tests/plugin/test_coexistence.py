# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Beside another plugin (`tests/support/other_plugin`), loaded before ours or after:
what can work together does, what cannot is refused by name, and without the flag the
other one is undisturbed."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.fresh_process import OTHER_PLUGIN

START = "load_general_plugins()\n"
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
WAY_OUT = (
    "Disable one of the two with VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
)

ENGINE = """
import sys
sys.path.{place}
from pathlib import Path
from tests.support.engine import moe_layers, run, start
if __name__ == "__main__":
    {code}
"""


def engine(code: str, acme: str, order: str = "before"):
    """Runs a real engine in a process of its own, with both plugins loaded by vLLM."""
    place = (
        f"insert(0, {OTHER_PLUGIN!r})"
        if order == "before"
        else f"append({OTHER_PLUGIN!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", ENGINE.format(place=place, code=code)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "ACME": acme},
    )


@ORDERS
@pytest.mark.parametrize(
    ("acme", "name"),
    [
        ("layer", "RoutedExperts by acme_moe.AcmeRoutedExperts"),
        ("runner", "MoERunner by acme_moe"),
    ],
)
def test_a_layer_class_of_another_plugin_is_named(fresh, checkpoint, acme, name, order):
    """With the flag the start is refused before anything is built."""
    model = str(checkpoint)
    flag = fresh(f"{START}parse({model!r}, '--moe-gpu-prefetch=8')", acme, order)
    assert flag.status == 2 and "Traceback" not in flag.output, flag.output
    assert f"another plugin replaced {name}" in flag.output and WAY_OUT in flag.output
    script = fresh(f"{START}ask({model!r})", acme, order)
    assert f"MoEPrefetchError: another plugin replaced {name}" in script.output


@ORDERS
def test_another_plugins_layer_classes_are_undisturbed_without_the_flag(fresh, order):
    """Both register; the registry holds the other's classes alone."""
    code = (
        "load_general_plugins()\nfrom vllm.model_executor.custom_op import "
        "op_registry_oot as r\n"
    )
    result = fresh(
        f"{code}print({{n: c.__name__ for n, c in r.items()}})", "layer,runner", order
    )
    assert (
        "{'RoutedExperts': 'AcmeRoutedExperts', 'MoERunner': 'AcmeMoERunner'}"
        in result.output
    )


@ORDERS
def test_the_order_is_what_these_tests_say(fresh, order):
    """vLLM loads plugins in the order of sys.path."""
    code = (
        "from importlib.metadata import entry_points\n"
        "print([e.name for e in entry_points(group='vllm.general_plugins')])"
    )
    output = fresh(code, "layer", order).output
    assert (output.index("acme") < output.index("moe_gpu_prefetch")) == (
        order == "before"
    )


@pytest.mark.parametrize(
    ("acme", "order"),
    [("chained", "before"), ("chained", "after"), ("unmarked", "before")],
)
def test_wraps_on_wraps_work_and_are_named(fresh, checkpoint, acme, order):
    """Every method is reached through both, and one line names the other plugin at
    each. Around our wraps the other plugin's show what they call (functools.wraps);
    below them they need not."""
    code = (
        f"{START}arguments = parse({str(checkpoint)!r}, '--moe-gpu-prefetch=8')\n"
        "print(arguments.create_engine_config().additional_config)"
    )
    result = fresh(code, acme, order)
    assert result.status == 0 and "{'moe_gpu_prefetch': 8}" in result.output, (
        result.output
    )
    for method in ("add_cli_args", "from_cli_args", "create_engine_config"):
        assert f"acme saw {method}\n" in result.output
    lines = [x for x in result.output.splitlines() if "Other plugins wrap" in x]
    assert len(lines) == 1
    function = "wrap" if acme == "chained" else acme
    wrap = f"acme_moe.{acme}.<locals>.make.<locals>.acme_{function}"
    for method in (
        "EngineArgs.add_cli_args",
        "EngineArgs.from_cli_args",
        "EngineArgs.create_engine_config",
        "BaseModelLoader.load_model",
    ):
        assert f"{method}: {wrap}" in lines[0]


def test_a_wrap_that_hides_what_it_calls_is_refused_by_name(fresh, checkpoint):
    """This one calls ours, but does not show it: it is taken for one that does not."""
    result = fresh(
        f"{START}parse({str(checkpoint)!r}, '--moe-gpu-prefetch=8')",
        "unmarked",
        "after",
    )
    assert result.status == 2 and "Traceback" not in result.output, result.output
    assert (
        "another plugin replaced EngineArgs.add_cli_args by acme_moe.unmarked.<locals>."
        "make.<locals>.acme_unmarked, which does not show that it calls expert slots"
        in result.output
    )
    assert WAY_OUT in result.output


@pytest.mark.parametrize(
    ("acme", "method"),
    [
        ("severed_from_cli_args", "EngineArgs.from_cli_args"),
        ("severed_create_engine_config", "EngineArgs.create_engine_config"),
        ("severed_load_model", "BaseModelLoader.load_model"),
    ],
)
def test_a_wrap_of_ours_that_is_no_longer_reached_is_refused(
    fresh, checkpoint, acme, method
):
    """Never silently off: the flag is refused as soon as it is parsed."""
    result = fresh(
        f"{START}parse({str(checkpoint)!r}, '--moe-gpu-prefetch=8')", acme, "after"
    )
    assert result.status == 2 and "Traceback" not in result.output, result.output
    assert (
        f"replaced {method} by acme_moe._sever.<locals>.make.<locals>.acme_"
        in result.output
    )
    assert WAY_OUT in result.output


@pytest.mark.parametrize("acme", ["severed_from_cli_args", "severed_load_model"])
def test_scripts_are_refused_alike(fresh, checkpoint, acme):
    """`LLM(...)` goes past the parser."""
    result = fresh(f"{START}ask({str(checkpoint)!r})", acme, "after")
    assert "MoEPrefetchError: another plugin replaced" in result.output


def test_a_replaced_method_does_not_matter_without_the_flag(fresh, checkpoint):
    """The other plugin works as it would alone."""
    code = (
        f"{START}config = parse({str(checkpoint)!r}).create_engine_config()\n"
        "print(config.additional_config)"
    )
    result = fresh(code, "severed_create_engine_config,severed_load_model", "after")
    assert result.status == 0 and "another plugin" not in result.output


def test_a_load_format_whose_class_passes_by_is_refused(fresh, checkpoint):
    """Its own `load_model` would build the model past the slots."""
    code = f"{START}ask({str(checkpoint)!r}, load_format='acme')"
    result = fresh(code, "loader")
    assert "cannot be combined with --load-format acme" in result.output
    assert "writes weights without calling the layers' weight loaders" in result.output


STARTS = "start(Path({model!r}), slots=8)"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("acme", "order", "message"),
    [
        (
            "severed_create_engine_config",
            "after",
            "another plugin replaced EngineArgs.create_engine_config by "
            "acme_moe._sever",
        ),
        (
            "takes_over_while_loading",
            "before",
            "--moe-gpu-prefetch 8: 4 of 4 MoE layers of Qwen3MoeForCausalLM",
        ),
        (
            "severed_processing",
            "after",
            "--moe-gpu-prefetch 8: 4 of 4 MoE layers got no slots, because Unquantized",
        ),
    ],
)
def test_the_engine_never_starts_without_the_slots_that_were_asked_for(
    checkpoint, acme, order, message
):
    """What the front end cannot see, the process that loads the model does."""
    result = engine(STARTS.format(model=str(checkpoint)), acme, order)
    assert result.returncode != 0
    assert f"MoEPrefetchError: {message}" in result.stderr, result.stderr[-3000:]


def test_a_runner_of_the_transformers_backend_is_named(checkpoint):
    """Its class is looked for only where that backend is used."""
    code = f"start(Path({str(checkpoint)!r}), slots=8, model_impl='transformers')"
    result = engine(code, "transformers_runner")
    assert (
        "replaced TransformersMoERunner by acme_moe.AcmeTransformersMoERunner"
        in result.stderr
    )


@pytest.mark.exhaustive
@ORDERS
def test_another_plugins_layers_serve_without_the_flag(checkpoint, order):
    """The real engine runs on the other's class."""
    llm = f"start(Path({str(checkpoint)!r}))"
    code = f"print({{type(m).__name__ for m in moe_layers({llm})}})"
    result = engine(code, "layer,runner", order)
    assert "{'AcmeRoutedExperts'}" in result.stdout, result.stderr[-3000:]


@pytest.mark.exhaustive
@ORDERS
def test_two_plugins_that_chain_give_stocks_answers_from_slots(checkpoint, order):
    """Loading and the processing of weights pass both; the outputs are stock's, bit for
    bit."""
    code = (
        f"model = Path({str(checkpoint)!r}); stock = run(model); slotted = run(model, "
        "slots=8); print(stock.outputs == slotted.outputs, slotted.total('loads') > "
        "0)"
    )
    result = engine(code, "chained,processing", order)
    assert "True True" in result.stdout, result.stderr[-3000:]
    assert (
        "acme saw load_model" in result.stderr
        and "acme saw processing" in result.stderr
    )
