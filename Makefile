# `make` alone prints this help. Everything runs in .venv, which any target makes when it is missing or out of date.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help setup demo check format test benchmark benchmark-omniglot benchmark-methods benchmark-sinusoid benchmark-speed benchmark-intervals bench-kills bench-fuzz bench-faults bench-long bench-reliability wheel clean

help:  ## this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.ready  ## make .venv with everything in it (quick when nothing changed)

# uv picks a torch and a torchvision that fit each other. Bytecode is compiled here, as pip does, so that commands start fast.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev,sweep]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true  # some packages carry files for other Pythons
	touch $@

demo: setup  ## MAML on the embedded data, trained and tested for real, in under 3 minutes
	metalearn train experiment=demo $(DEMO)

check: setup  ## the quick loop: format, lint, types, fast tests (one to two minutes)
	ruff format --check .
	ruff check .
	mypy
	pytest -m "not slow" -n 2

format: setup  ## mend what format and lint can mend by themselves
	ruff format .
	ruff check --fix .

test: setup  ## all tests; TEST="-m slow": those that `make check` leaves out
	pytest -n 2 $(TEST)

BUDGET ?= quick
benchmark: setup  ## every recipe of a published figure at BUDGET=smoke|quick|paper, skipping what is done
	python scripts/benchmark.py budget=$(BUDGET) $(BENCHMARK)

benchmark-omniglot: setup  ## the recipes on Omniglot alone
	python scripts/benchmark.py budget=$(BUDGET) only=omniglot $(BENCHMARK)

METHODS ?= jobs=1
benchmark-methods: setup  ## every method on Omniglot, some on CIFAR-FS, up to 20 minutes each: METHODS="only=omniglot_5w1s jobs=2"
	python scripts/benchmark_methods.py $(METHODS)

benchmark-sinusoid: setup  ## four methods on sinusoids: error over inner steps, fitted curves
	python scripts/benchmark_sinusoid.py

benchmark-intervals: setup  ## that the 95% interval covers the truth in 95% of simulated runs, into benchmarks/
	python scripts/benchmark_intervals.py

benchmark-speed: setup  ## training speed against a plain loop over tasks, and what it rests on, into benchmarks/
	python scripts/benchmark_speed.py

bench-kills: setup  ## 100 random kills with resume, compared bit for bit, into docs/reliability.md
	python scripts/bench_kills.py

bench-fuzz: setup  ## 10,000 random command lines and 300 processes, into docs/reliability.md
	python scripts/bench_fuzz.py

bench-faults: setup  ## full disks, killed processes, lying downloads and more, into docs/reliability.md (as root, on Linux)
	python scripts/bench_faults.py

bench-long: setup  ## memory over 10,000 steps, a thousand runs compared, into docs/reliability.md
	python scripts/bench_long.py

bench-reliability: bench-kills bench-fuzz bench-faults bench-long  ## all four

wheel: setup  ## a wheel in dist/
	$(BIN)/uv build --quiet --wheel

clean:  ## remove the environment and what tools left
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
