# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which number of slots and which policy to take, and what the next GiB buys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import Point
from vllm.plugins.moe_gpu_prefetch.command.tune.speed import GIVEN, Speed
from vllm.plugins.moe_gpu_prefetch.command.tune.steps import DECODE, PREFILL
from vllm.plugins.moe_gpu_prefetch.command.tune.study import Figures, Study

CLOSE, CLOSE_WITHIN_A_LIMIT = 0.05, 0.01
"""A number of slots is enough if no other needs less time for the recorded steps by
more than this share. Within a limit the memory is there to be used."""

CLOSE_RATE = 0.01
"""The same without predictions, as a difference of hit rates."""

FEWER_LOADS = 0.02
"""Share of the loads from which another policy is worth a change."""

WORTH_A_GIB = 0.05
"""Share of tokens a second, or of loads, from which a GiB is better spent on slots."""

_ENOUGH_STEPS = 200
_FEW_PREFILLS = 0.02
_DEFAULT = MoEPrefetchConfig(slots=1)


@dataclass(frozen=True)
class NextGib:
    """What more memory buys.

    Attributes:
        slots: more for each layer.
        num_bytes: what they take: at most a GiB, unless one slot more takes more.
        loads: share of the loads that they save.
        speed: share of tokens a second that they add; None without predictions.
        context: tokens of KV cache in the same memory; None if the trace does not say.
    """

    slots: int
    num_bytes: int
    loads: float
    speed: float | None
    context: int | None

    @property
    def on_slots(self) -> bool:
        """Whether the memory is better spent on slots."""
        gain = self.loads if self.speed is None else self.speed
        # A single layer's slot takes the place of its staging row, and costs nothing.
        return gain * GIB >= WORTH_A_GIB * self.num_bytes


class Advice:
    """The recommendation for a rank.

    Args:
        study: with the figures of `rows` for both policies of the engine.
        rows: numbers of slots that may be recommended, ascending.
        speed: for predictions; None without.
        limit: the most slots that may be recommended; None without a limit.

    Attributes:
        kind: of the steps that count: those that decode, if there are any.
        predicts: whether tokens a second decide; otherwise hit rates do.
        policy: recommended: the recorded one, unless the other loads clearly less.
        slots: recommended.
        best: of `rows`, the one that needs least time for all steps, or hits most.
        close: the share of that time that another number may need more.
        fits_whole: whether the limit has room for every expert.
        next_gib: None if every expert has a slot.
    """

    def __init__(
        self,
        study: Study,
        rows: Sequence[int],
        speed: Speed | None,
        limit: int | None,
    ):
        self._study, self._speed = study, speed
        self.close = CLOSE if limit is None else CLOSE_WITHIN_A_LIMIT
        self.fits_whole = limit is not None and limit >= study.num_experts
        self.kind = DECODE if study.work.steps[DECODE] else PREFILL
        self.predicts = speed is not None and speed.decides
        self.policy = study.policy
        self.slots, self.best = self._enough(rows)
        if self.fewer_loads(self.other_policy, self.policy) > FEWER_LOADS:
            self.policy = self.other_policy
            self.slots, self.best = self._enough(rows)
        self.next_gib = self._next_gib()

    def _enough(self, rows: Sequence[int]) -> tuple[int, int]:
        """The fewest slots that are close to the best of `rows`, and the best."""
        values = {slots: self._value(slots) for slots in rows}
        best = max(rows, key=lambda slots: (values[slots], -slots))
        if best == self._study.num_experts:
            return best, best  # stock's own layers, which load nothing
        most = values[best]
        least = most / (1 + self.close) if self.predicts else most - CLOSE_RATE
        return min(slots for slots in rows if values[slots] >= least), best

    @property
    def other_policy(self) -> str:
        """The policy of the engine that was not recorded."""
        return "lfu" if self._study.policy == "lru" else "lru"

    def figures(self, slots: int) -> Figures:
        """With the recommended policy."""
        return self._study.figures[Point(slots, self.policy)]

    def tokens_per_second(self, slots: int) -> float | None:
        """Of the steps that count, with the recommended policy."""
        if self._speed is None:
            return None
        loaded = self.figures(slots).bytes_loaded[self.kind]
        return self._speed.tokens_per_second(self._study.work, loaded, self.kind)

    def fewer_loads(self, policy: str, than: str) -> float:
        """The share of the loads of the policy `than` that `policy` saves at the
        recommended number; negative if it loads more."""
        loads, fewer = (self._loads(self.slots, each) for each in (than, policy))
        return 1 - fewer / loads if loads else 0.0

    def _loads(self, slots: int, policy: str) -> int:
        return self._study.figures[Point(slots, policy)].loads[self.kind]

    def _value(self, slots: int) -> float:
        """Recorded runs a second of predicted time, or the hit rate."""
        if not self.predicts or self._speed is None:
            return self.figures(slots).hit_rate
        steps, loaded = self._study.work.steps, self.figures(slots).bytes_loaded
        return 1 / self._speed.seconds(sum(steps), sum(loaded))

    def _next_gib(self) -> NextGib | None:
        study, slots, policy = self._study, self.slots, self.policy
        if slots >= study.num_experts:
            return None

        def memory(slots: int) -> int:
            return study.slot_bytes(slots) + study.staging_bytes(slots)

        more = slots + 1
        while more < study.num_experts and memory(more + 1) - memory(slots) <= GIB:
            more += 1
        study.run([Point(more, policy)])
        before, after = (study.figures[Point(each, policy)] for each in (slots, more))
        was, becomes = before.loads[self.kind], after.loads[self.kind]
        loads = 1 - becomes / was if was else 0.0
        speed = None
        if self.predicts and self._speed is not None:
            steps = study.work.steps[self.kind]
            slower, faster = (
                self._speed.seconds(steps, each.bytes_loaded[self.kind])
                for each in (before, after)
            )
            speed = slower / faster - 1
        num_bytes = memory(more) - memory(slots)
        known = [trace.kv_bytes_per_token for trace in study.traces]
        of_a_token = next(filter(None, known), None)
        context = int(num_bytes / of_a_token) if of_a_token else None
        return NextGib(more - slots, num_bytes, loads, speed, context)

    @property
    def flag(self) -> str:
        """What to give `vllm serve`."""
        flag = f"--moe-gpu-prefetch {self.slots}"
        if self.policy != _DEFAULT.policy:
            flag += f" --moe-gpu-prefetch-config.policy {self.policy}"
        half_life = self._study.layers[0].lfu_half_life
        if self.policy == "lfu" and half_life != _DEFAULT.lfu_half_life:
            flag += f" --moe-gpu-prefetch-config.lfu_half_life {half_life}"
        return flag

    def warnings(self) -> Iterator[str]:
        """Why the figures may mislead, in sentences."""
        decode, prefill = self._study.work.steps
        if decode + prefill < _ENOUGH_STEPS:
            yield (
                f"The trace has {decode + prefill:,} steps of a layer. Record some "
                "hundred or more: the slots' first steps weigh too much here."
            )
        lost = sum(layer.lost for trace in self._study.traces for layer in trace.layers)
        if lost:
            yield (
                f"{lost:,} steps of layers are missing, so hit rates are estimates: "
                "what they needed is not known."
            )
        derived = self._speed is not None and self._speed.step_time_from != GIVEN
        if self.predicts and derived and prefill > _FEW_PREFILLS * decode:
            yield (
                "The step time is the mean of steps that decode and of steps that read "
                "prompts, which take longer. Give that of decode steps: --step-time "
                "12ms."
            )
        if not decode:
            yield "No step only decodes. All figures are of steps that read prompts."
        elif decode < prefill:
            yield (
                f"Only {decode:,} of {decode + prefill:,} steps decode. Hit rates are "
                "mostly of steps that read prompts."
            )
