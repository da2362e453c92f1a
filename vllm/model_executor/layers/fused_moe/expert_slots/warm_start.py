# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Warm start: the experts that were resident when an engine ended are resident when the
next one begins.

A worker keeps one small file for all its layers, in the directory that the user named.
It writes the file when it is idle, every five minutes under load, and at its end, so a
killed worker leaves a file too. The file only decides which experts are copied into
slots before the first request. A wrong file costs speed and cannot change an answer. So
a file that is damaged, or that belongs to another model or user, is ignored with one
line.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.backend import SlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.background import (
    BackgroundThread,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.format import key_of
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.identity import (
    checkpoint_directory,
    store_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    open_own,
)

logger = init_logger(__name__)

WARM_START = "warm_start"
"""The option of `MoEPrefetchConfig`."""

INTERVAL_S, IDLE_S = 300.0, 5.0
"""Seconds between two writes under load; seconds without a step after which the worker
writes."""

MAX_BYTES = 1 << 24
"""Size from which a file is not read. A hundred layers of 512 experts take 1.5 MB."""

_IDENTITY = (
    *("model", "weights", "configuration", "rank"),
    *("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel"),
)
"""The parts of `store_identity` that say which expert is which. The number of slots and
the policy are not among them: residents of another N and policy are of use too."""


def residents_identity(vllm_config: VllmConfig, rank: int) -> dict[str, Any]:
    """The models and the rank that residents belong to, as JSON."""
    speculation = vllm_config.speculative_config
    draft = speculation.draft_model_config if speculation is not None else None
    models = [_identity(vllm_config, vllm_config.model_config, rank)]
    if (
        draft is not None
        and (other := _identity(vllm_config, draft, rank)) != models[0]
    ):
        models.append(other)
    return {"models": models}


def _identity(
    vllm_config: VllmConfig, model_config: ModelConfig, rank: int
) -> dict[str, Any]:
    directory = checkpoint_directory(vllm_config, model_config)
    if directory is None:  # of a draft; the model's own files were found before loading
        return {"model": model_config.model, "rank": rank}
    identity = store_identity(vllm_config, model_config, directory, rank)
    return {name: identity[name] for name in _IDENTITY}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Natural = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Layer(_Strict):
    """`Ranking` of a layer with `num_experts` experts."""

    num_experts: _Natural
    experts: list[_Natural]
    counts: list[_Natural]

    @model_validator(mode="after")
    def _fits(self) -> "_Layer":
        if len(self.counts) != len(self.experts):
            raise ValueError(
                f"{len(self.experts)} experts and {len(self.counts)} counts"
            )
        if len(set(self.experts)) != len(self.experts):
            raise ValueError("an expert is listed twice")
        if self.experts and max(self.experts) >= self.num_experts:
            raise ValueError(f"expert {max(self.experts)} of {self.num_experts}")
        return self


class _Content(_Strict):
    format: Literal[1] = 1
    identity: dict[str, Any]
    written: AwareDatetime
    layers: dict[str, _Layer]


class ResidentsFile:
    """The file with the residents of one identity, in a directory that `make_place` has
    checked.

    Attributes:
        path: its name follows from the identity, so models and ranks can share the
            directory.
    """

    def __init__(self, place: Path, identity: dict[str, Any]):
        self._identity = identity
        self.path = place / f"residents-{key_of(identity)}.json"

    def read(self, managers: Mapping[str, SlotManager]) -> dict[str, Ranking]:
        """The residents to start with, by layer name. Logs one line: what was found, or
        why the file is ignored.

        Args:
            managers: of the worker's layers, by layer name.
        """
        try:
            content = self._content()
            if content.identity != self._identity:
                raise _Unusable("it belongs to another model or rank")
            found = {
                name: content.layers[name]
                for name in managers
                if name in content.layers
            }
            for name, layer in found.items():
                if layer.num_experts != managers[name].num_experts:
                    raise _Unusable(
                        f"{name} has {managers[name].num_experts} experts, not "
                        f"{layer.num_experts}"
                    )
        except FileNotFoundError:
            logger.info(
                "Warm start: %s does not exist yet. Slots start as without it.",
                self.path,
            )
            return {}
        except (_Unusable, OSError) as reason:
            logger.warning(
                "Warm start: %s is ignored: %s. Slots start as without it.",
                self.path,
                reason,
            )
            return {}
        logger.info(
            "Warm start: the slots of %d of %d MoE layers are filled from %s, written "
            "%s.",
            len(found),
            len(managers),
            self.path,
            content.written.isoformat(" ", "seconds"),
        )
        return {
            name: Ranking(layer.experts, layer.counts) for name, layer in found.items()
        }

    def _content(self) -> _Content:
        # Opening a pipe would block without O_NONBLOCK.
        opened = open_own(self.path, os.O_RDONLY | os.O_NONBLOCK)
        if isinstance(opened, str):
            raise _Unusable(f"it {opened}")
        with open(opened, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise _Unusable(f"it has more than {MAX_BYTES:,} bytes")
        try:
            return _Content.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _Unusable(f"it is damaged ({where!r}: {first['msg']})") from None

    def write(
        self, rankings: Mapping[str, Ranking], managers: Mapping[str, SlotManager]
    ) -> None:
        """Replaces the file atomically: a reader sees the whole old file or the whole
        new one.

        Raises:
            OSError: the directory cannot be written.
        """
        layers = {
            name: _Layer(
                num_experts=managers[name].num_experts,
                experts=ranking.experts,
                counts=ranking.counts,
            )
            for name, ranking in rankings.items()
        }
        content = _Content(
            identity=self._identity, written=datetime.now(UTC), layers=layers
        )
        descriptor, temporary = tempfile.mkstemp(
            dir=self.path.parent, prefix=f"{self.path.name}."
        )
        try:
            with open(descriptor, "w") as file:
                file.write(content.model_dump_json())
            os.replace(temporary, self.path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


class _Unusable(Exception):
    """Why a file is ignored."""


class ResidentsKeeper:
    """Writes the residents of a worker's layers to their file: every `INTERVAL_S` under
    load, after `IDLE_S` without a step, and at the worker's end.

    `vllm serve` kills its workers at SIGTERM, unless `--shutdown-timeout` gives them
    time to end. A worker that was idle before has written by then.

    A thread keeps the intervals, because an idle worker waits for a message and calls
    nothing. The thread adds nothing to a step. It copies each layer's tables as they
    are; on a GPU it uses a stream of its own and does not wait for the engine's. If a
    step changed the tables meanwhile, so that they contradict each other, the last good
    reading of that layer is kept. The thread starts after warm-up, so it does not copy
    while a CUDA graph is captured. Sleep mode would unmap the tables and is refused
    with slots.
    """

    def __init__(self, file: ResidentsFile, managers: Mapping[str, SlotManager]):
        self._file, self._managers = file, managers
        self._rankings: dict[str, Ranking] = {}
        self._steps = 0
        self._thread = BackgroundThread("expert-residents", self._run)
        self._thread.start()

    def _run(self) -> None:
        seen, due = self._steps, time.monotonic() + INTERVAL_S
        while self._thread.pause(IDLE_S):
            before, seen = seen, self._count()
            if seen == before or time.monotonic() >= due:
                self.write()
                due = time.monotonic() + INTERVAL_S

    def _count(self) -> int:
        return sum(manager.counters.steps for manager in self._managers.values())

    def write(self) -> None:
        """Writes what is resident, unless no layer made a step since the last write or
        the start."""
        steps = self._count()
        if steps == self._steps:
            return
        try:
            for name, manager in self._managers.items():
                with suppress(AssertionError):  # read within a step
                    self._rankings[name] = manager.ranking()
            self._file.write(self._rankings, self._managers)
        except Exception as error:
            # Whatever failed, a lost GPU included, the worker goes on, or ends as it
            # would without this.
            logger.warning("Warm start: %s was not written: %s", self._file.path, error)
            return
        self._steps = steps
        logger.debug("Warm start: %s was written.", self._file.path)

    def close(self) -> None:
        """Writes for the last time. A second call changes nothing."""
        if self._thread.end():
            self.write()
