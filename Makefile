# Every target creates .venv and keeps it up to date by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread for each test process, as small tensors gain nothing from more, and a process more than
# cores, as some tests wait for others to start or end; each takes up to 3 GB.
TEST_ENV := OMP_NUM_THREADS=1
PROCESSES := $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$((cores < 3 ? cores + 1 : 4)))
# Who is done takes tests from others, as some take a minute and most no time.
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal --timeout 600

.PHONY: help bench test test-deep lint format types unit interpreter gpu clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

# Without byte code (--no-compile) of all that is installed: Python makes it of what is imported.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "blnet needs Python 3.11 to 3.13; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[all,dev]'
	touch $@

bench: $(INSTALLED)  ## measure Big-Little networks against ResNet-50 (ARGS="--full" for more)
	$(BIN)/blnet bench $(ARGS)

# The type check needs one core and a minute; tests meanwhile use the other one.
test: lint  ## lint, check types and run every test
	$(MAKE) --no-print-directory -j 2 types unit
	$(MAKE) --no-print-directory interpreter

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
types: $(INSTALLED)  ## mypy over the layout as installed, and the tests' helpers
	@rm -rf build/types && mkdir -p build/types/blnet
	@ln -s $(CURDIR)/blnet/* $(foreach f,kernels vision speech bench,$(CURDIR)/$(f)) build/types/blnet/
	@ln -s $(CURDIR)/tests/helpers build/types/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache \
	  -p blnet -p helpers

unit: $(INSTALLED)  ## the tests that need no Triton interpreter
	$(PYTEST) tests --ignore tests/interpreter $(ARGS)

interpreter: $(INSTALLED)  ## the kernels on the CPU, in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter $(ARGS)

gpu:  ## everything that needs a GPU: correctness, suites, sanitizer (GPU_PYTHON=, OUT=, LIMIT=)
	@GPU_PYTHON="$(GPU_PYTHON)" OUT="$(OUT)" LIMIT="$(LIMIT)" .ci/gpu

clean:  ## remove .venv, caches and build products; results stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks *.egg-info
	find blnet kernels vision speech bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
