# Every target creates .venv and keeps it up to date by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread for each test process, as small tensors gain nothing from more, and a process more than
# cores, as some tests wait for others to start or end; each takes up to 3 GB.
TEST_ENV := OMP_NUM_THREADS=1
PROCESSES := $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 3 ? cores + 1 : 4)))
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(PROCESSES) --timeout 600

.PHONY: help bench test test-deep lint format types unit interpreter gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "blnet needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	touch $@

bench: $(INSTALLED)  ## measure Big-Little networks against ResNet-50 (ARGS="--full" for more)
	$(BIN)/blnet bench $(ARGS)

test: lint types unit interpreter  ## lint, check types and run every test

# Hours on two cores: more cases each of the tests that draw shapes, none of them twice the same.
DEEP := 10000
test-deep: $(INSTALLED)  ## 10,000 fresh cases of every op in the interpreter (DEEP=n)
	TRITON_INTERPRET=1 BLNET_DEEP=$(DEEP) $(TEST_ENV) $(BIN)/python -m pytest -n $(PROCESSES) tests/interpreter \
	  -k fresh_seed $(ARGS)

lint: $(INSTALLED)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Type checkers cannot see through the folder-to-package mapping, so they get the installed layout.
types: $(INSTALLED)  ## mypy over the layout as installed
	@rm -rf build/types && mkdir -p build/types/blnet
	@ln -s $(CURDIR)/blnet/* $(foreach f,kernels vision speech bench,$(CURDIR)/$(f)) build/types/blnet/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p blnet

unit: $(INSTALLED)  ## the tests that need no Triton interpreter
	$(PYTEST) tests --ignore tests/interpreter $(ARGS)

interpreter: $(INSTALLED)  ## the kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter $(ARGS)

# On a machine with a GPU and no network, whose own Python has torch, triton, torchvision, rich,
# scikit-learn, pytest-benchmark, accelerate, timm and torchmetrics: make gpu GPU_PYTHON=python3 OUT=folder
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
OUT ?= results/gpu
gpu:  ## everything that needs a GPU: correctness, sanitizer, suites (GPU_PYTHON=, OUT=)
	@mkdir -p $(OUT)
	@$(GPU_PYTHON) -c 'import blnet.kernels' 2>/dev/null || \
	  $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m blnet.cli doctor --json > $(OUT)/doctor.json
	@status=0; jobs=$$(nproc); test $$jobs -le 16 || jobs=16; \
	run() { name=$$1; limit=$$2; shift 2; echo "== $$name"; \
	  timeout --signal=INT --kill-after=10 $$limit "$$@" > $(OUT)/$$name.txt 2>&1 || \
	    { echo "$$name failed ($$?)"; status=1; }; \
	  tail -n 12 $(OUT)/$$name.txt; }; \
	run check 60 $(GPU_PYTHON) -m blnet.cli kernels check --device cuda --jobs $$jobs; \
	run tests 140 $(GPU_PYTHON) -m pytest -q tests/test_gpu.py tests/test_gpu_optimizing.py; \
	run training 60 $(GPU_PYTHON) -m pytest -q tests/test_gpu_training.py; \
	if command -v compute-sanitizer >/dev/null; then \
	  run sanitizer 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
	    $(GPU_PYTHON) -m blnet.cli kernels check --device cuda --dtype bfloat16 --op expand_merge; \
	else echo "compute-sanitizer is not installed here: not run"; fi; \
	run kernels 90 $(GPU_PYTHON) -m blnet.cli bench kernels --device cuda --output $(OUT)/kernels; \
	run models 175 $(GPU_PYTHON) -m blnet.cli bench models --device cuda --alpha 2 --beta 4 \
	  --output $(OUT)/models; \
	exit $$status

clean:  ## remove .venv, caches and build products; results stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	find blnet kernels vision speech bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
