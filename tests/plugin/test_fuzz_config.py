# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whatever is given to the flag and its options is understood in full or refused by
value."""

import functools
import json
import math
from dataclasses import asdict, fields
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    host_memory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.plugins.moe_gpu_prefetch import register

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
SLOTS = st.integers(1, 64) | st.just("auto") | JSON
KEYS = st.sampled_from([field.name for field in fields(MoEPrefetchConfig)])
VALUES = (
    st.sampled_from(
        ["lru", "lfu", "LRU", 1, 1 << 20, 128.0, "128", "", "\0", "\ud800", 1e308]
    )
    | st.floats(0, 64)
    | JSON
)
OPTIONS = (
    st.dictionaries(KEYS, VALUES) | st.dictionaries(KEYS | st.text(), VALUES) | JSON
)
# What a command line can carry: no NUL, and bytes that are no UTF-8 as lone surrogates.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0") | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)
TEXT = st.text(CHARACTERS)


def same(given: object, read: object) -> bool:
    """Equal, and of one kind: a flag is no number, a text neither."""
    kinds = (bool, int | float, str, dict, list)
    return given == read and all(
        isinstance(given, k) == isinstance(read, k) for k in kinds
    )


def assert_understood(
    config: MoEPrefetchConfig, slots: object, options: dict[str, Any] | None
) -> None:
    """Nothing given is lost or changed, and it reads as the same again."""
    assert same(slots, config.slots)
    for name, value in (options or {}).items():
        assert same(value, getattr(config, name)), (name, value, config)
    again = {name: value for name, value in asdict(config).items() if name != "slots"}
    assert MoEPrefetchConfig.validated(config.slots, again) == config


def assert_named(message: str, *values: object) -> None:
    """The message holds one of the values that were given, or a part of it."""

    def parts(value: object):
        yield value
        for inner in value.values() if isinstance(value, dict) else ():
            yield from parts(inner)

    names = [repr(part) for value in values for part in parts(value)]
    assert any(name in message for name in names), (message, values)


@given(slots=SLOTS, options=OPTIONS)
@example(slots=8, options=[])
@example(slots=8, options=False)
@example(slots=8, options={"lfu_half_life": True})
@example(slots=8, options={"host_memory_reserve": math.inf})
@example(slots=8, options={"shared_store": ""})
@example(slots=None, options=0)
def test_additional_config_takes_any_json(slots, options):
    """A configuration that says what was given, an error that names it, or, with
    nothing given, stock."""
    given = {"moe_gpu_prefetch": slots, "moe_gpu_prefetch_config": options}
    try:
        config = MoEPrefetchConfig.of(SimpleNamespace(additional_config=given))
    except MoEPrefetchError as error:
        assert_named(str(error), slots, options)
        return
    if config is None:
        assert slots is None and (options is None or options == {})
        return
    assert_understood(config, slots, options)
    assert host_memory().reserve(config.host_memory_reserve) >= 0


def stocks(*arguments: str) -> object:
    """What vLLM's parser makes of an additional_config."""
    return parser().parse_args(arguments).additional_config


@functools.cache
def parser() -> FlexibleArgumentParser:
    register()
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.fixture(scope="module")
def parse(checkpoint):
    """What the command makes of its arguments: an `EngineArgs`, or a `SystemExit`."""

    def parse(*arguments: str) -> AsyncEngineArgs:
        parsed = parser().parse_args(["--model", str(checkpoint), *arguments])
        return AsyncEngineArgs.from_cli_args(parsed)

    return parse


def outcome(parse, capsys, *arguments: str) -> MoEPrefetchConfig | str | None:
    """The configuration, or the last line of what the command says when it ends."""
    capsys.readouterr()
    try:
        parsed = parse(*arguments)
    except SystemExit as stop:
        assert stop.code == 2
        return capsys.readouterr().err.rpartition("error: ")[2]
    return MoEPrefetchConfig.of(parsed)


fuzzed = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def as_number(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


@given(text=TEXT | st.integers().map(str) | st.just("auto"))
@example(text="")
@example(text="9" * 5000)
@fuzzed
def test_the_flag_takes_any_text(parse, capsys, text):
    """A number of slots, `auto`, or argparse's exit with the value."""
    config = outcome(parse, capsys, f"--moe-gpu-prefetch={text}")
    if isinstance(config, str):
        assert_named(config, as_number(text))
    else:
        assert_understood(config, as_number(text), {})


@given(text=TEXT | OPTIONS.map(json.dumps))
@example(text="")
@example(text="[" * 50_000)
@example(text='{"lfu_half_life": ' + "9" * 5000 + "}")
@example(text='{"host_memory_reserve": Infinity}')
@fuzzed
def test_the_options_take_any_text(parse, capsys, text):
    """The options that the JSON holds, or argparse's exit with the value."""
    config = outcome(
        parse, capsys, "--moe-gpu-prefetch=8", f"--moe-gpu-prefetch-config={text}"
    )
    if isinstance(config, str):
        try:
            assert_named(config, json.loads(text), text)
        except (ValueError, RecursionError):
            assert_named(config, text)
    else:
        assert_understood(config, 8, json.loads(text))


@given(key=KEYS | TEXT, value=TEXT | VALUES.map(json.dumps))
@example(key="policy", value="fifo")
@example(key="shared_store", value="7")
@example(key="a.policy", value="lru")
@fuzzed
def test_dotted_keys_take_any_text(parse, capsys, key, value):
    """The same through vLLM's dotted keys, which are JSON where they can be read as
    JSON. Where stock's parser itself cannot read them, it cannot for a flag of its own
    either."""
    arguments = ("--moe-gpu-prefetch=8", f"--moe-gpu-prefetch-config.{key}={value}")
    try:
        config = outcome(parse, capsys, *arguments)
    except (ValueError, OverflowError, AttributeError) as error:
        with pytest.raises(type(error)):
            stocks(f"--additional-config.{key}={value}")
        return
    parsed = stocks(f"--additional-config.{key}={value}")
    if isinstance(config, str):
        assert_named(config, parsed)
    else:
        assert_understood(config, 8, parsed)


@given(additional=JSON)
@example(additional=[1])
@example(additional="text")
@fuzzed
def test_the_flag_beside_any_additional_config(parse, capsys, additional):
    """Other keys stay; what is no object is refused by value."""
    argument = f"--additional-config={json.dumps(additional)}"
    config = outcome(parse, capsys, "--moe-gpu-prefetch=8", argument)
    if isinstance(config, str):
        assert_named(config, stocks(argument))
    else:
        assert config == MoEPrefetchConfig(slots=8)
