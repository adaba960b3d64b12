# `make` prints the help. Everything runs in .venv; each target builds it if it is missing or out of
# date.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
export PYTHONDONTWRITEBYTECODE :=  # compiled files make every start seconds faster

# Every target with a help line; only .venv/.ready is a file.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\#.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:  ## print this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.ready  ## build .venv with all dependencies (quick if nothing changed)

# uv picks matching versions of torch and torchvision. Bytecode is compiled here, as pip does, so
# that commands start fast.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 10))'
$(VENV)/.ready: pyproject.toml
	@$(BIN)/python $(IS_NEW_ENOUGH) 2>/dev/null || rm -rf $(VENV)
	@test -x $(BIN)/python || $(PYTHON) $(IS_NEW_ENOUGH) || \
	  { echo "$(PYTHON) is no Python 3.10 or newer; name one: make setup PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev,export,pretrained,serve,sweep,tensorboard,text]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # some need other Pythons
	touch $@

demo: setup  ## train and test MAML on built-in data, in under 3 minutes
	metalearn train experiment=demo $(DEMO)

DEMO_RUN ?= models/maml-glyphs
demo-draw: setup  ## draw characters in the browser; the model of `make demo`, already trained
	metalearn serve run=$(DEMO_RUN) $(DEMO)

demo-label: setup  ## label 45 images of blood cells from five examples of each class
	@metalearn predict support=examples/bccd/support query=examples/bccd/query out=outputs/demo-label
	@echo "report: $(CURDIR)/outputs/demo-label/report.html"

docs: setup  ## build the manual into outputs/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

check: setup  ## quick checks: format, lint, types, fast tests (two minutes)
	ruff format --check .
	ruff check .
	mypy
	pytest -m "not slow" -n 2 --dist loadscope

format: setup  ## format, and apply the automatic fixes of lint
	ruff format .
	ruff check --fix .

test: setup  ## run all tests; TEST="-m slow": only those that `make check` skips
	pytest -n 2 --dist loadscope $(TEST)

BUDGET ?= day
benchmark: setup  ## run the gates of published results, one at a time: BUDGET=smoke|quick|day|paper
	python scripts/benchmark.py budget=$(BUDGET) $(BENCHMARK)

benchmark-omniglot: setup  ## run only the gates on Omniglot
	python scripts/benchmark.py budget=$(BUDGET) only=omniglot $(BENCHMARK)

METHODS ?= jobs=1
benchmark-methods: setup  ## train all methods, ≤ 20 min each: METHODS="only=omniglot_5w1s jobs=2"
	python scripts/benchmark_methods.py $(METHODS)

benchmark-sinusoid: setup  ## train four methods on sinusoids: error over inner steps, fitted curves
	python scripts/benchmark_sinusoid.py

benchmark-navigation: setup  ## adapt policies on 2D navigation; writes docs/navigation.md
	python scripts/benchmark_navigation.py

benchmark-intervals: setup  ## simulate the coverage of the 95% interval; writes benchmarks/
	python scripts/benchmark_intervals.py

DATA ?= $(METALEARN_DATA)
benchmark-scales: setup  ## train ProtoNet and ProtoMAML with different scales of their logits (an hour)
	python scripts/benchmark_scales.py caltech101=$(DATA)/images/caltech101/images.zip cifar100=$(DATA)/cifar100

benchmark-cross-domain: setup  ## test networks on datasets they were not trained on; writes benchmarks/
	python scripts/benchmark_cross_domain.py data=$(DATA) $(BENCHMARK)

benchmark-speed: setup  ## compare speed with a plain loop and other libraries, 40 min; writes benchmarks/
	python scripts/benchmark_speed.py $(BENCHMARK)

benchmark-precision: setup  ## compare gradients and accuracy in lower precision; writes benchmarks/
	python scripts/benchmark_precision.py data_dir=$(DATA) $(BENCHMARK)

benchmark-time: setup  ## minutes to 95% and 97% on Omniglot, an hour or more; resumable; writes benchmarks/
	python scripts/time_to_accuracy.py data_dir=$(DATA) $(BENCHMARK)

bench-kills: setup  ## kill and resume runs, compare bit for bit; writes docs/reliability.md
	python scripts/bench_kills.py

bench-fuzz: setup  ## run 10,000 random command lines and 300 processes; writes docs/reliability.md
	python scripts/bench_fuzz.py

bench-faults: setup  ## inject faults (Linux, root); writes docs/reliability.md
	python scripts/bench_faults.py

bench-long: setup  ## memory of 10,000 steps, comparison of 1,000 runs; writes docs/reliability.md
	python scripts/bench_long.py

bench-serve: setup  ## 10,000 hostile requests, latency, kill -9 of metalearn serve; writes benchmarks/serve.md
	python scripts/bench_serve.py

bench-reliability: bench-kills bench-fuzz bench-faults bench-long  ## run all four

wheel: setup  ## build a wheel in dist/
	$(BIN)/uv build --quiet --wheel

clean:  ## remove the environment and the files of tools
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
