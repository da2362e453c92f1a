# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One name of vLLM's that this feature wraps, replaces or relies on."""

from dataclasses import dataclass
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34", prereleases=True)
EVERY = SpecifierSet(prereleases=True)
V0_32 = SpecifierSet("<0.33.dev0", prereleases=True)
V0_33 = SpecifierSet(">=0.33.dev0", prereleases=True)


@dataclass(frozen=True)
class Seam:
    """A line of the table.

    Attributes:
        target: module:qualname.
        kind: what we do with it.
        reason: what for.
        parameters: the parameters that we use, by name.
        in_tree: what the same feature would do at this place as a patch on vLLM.
        versions: the versions of vLLM that have it, those not yet supported included.
        deferred: it is checked where it is applied, because its import takes long.
        on_cuda: its import needs CUDA's libraries.
    """

    target: str
    kind: Literal["wrapped", "replaced", "relied on"]
    reason: str
    parameters: tuple[str, ...] = ()
    in_tree: str = ""
    versions: SpecifierSet = EVERY
    deferred: bool = False
    on_cuda: bool = False

    def applies_to(self, version: str) -> bool:
        """Whether a vLLM of this version has it."""
        return self.versions.contains(Version(version))


def wrapped(target: str, reason: str, *parameters: str, **more: Any) -> Seam:
    """A method around which we put one of ours."""
    return Seam(target, "wrapped", reason, parameters, **more)


def replaced(target: str, reason: str, *parameters: str, **more: Any) -> Seam:
    """A class for which vLLM's out-of-tree registry builds ours."""
    return Seam(target, "replaced", reason, parameters, **more)


def relied_on(target: str, reason: str, *parameters: str, **more: Any) -> Seam:
    """A name that we call, read, set or subclass."""
    return Seam(target, "relied on", reason, parameters, **more)
