# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What cannot be served, with the reason. Where a new refusal goes:

an argument, or two that contradict  `arguments.py`
a layer or its runner                `layers.py`
a format of experts, or its method   `formats.py`
a whole model                        `models.py`
a kernel                             `Backend.objection`, in `cpu/` and `cuda/`
what does not fit                    `capacity/planner.py`
"""
