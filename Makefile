# make demo and make test need a Linux machine with Python >= 3.10, and nothing else. A C++ compiler makes it faster.
PYTHON ?= python3
BIN := .venv/bin
INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/cuda/*)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Byte code: pip would make it on one core. Some packages bring files that are no Python 3; what they lack, they lack.
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true

# Threads that wait by spinning slow each other down many times over where the cores are shared, as on most CI machines.
# Benchmarks see what users see: the default.
demo test test-scale fuzz quality quality-smoke: export OMP_WAIT_POLICY ?= PASSIVE

MEASURE := mkdir -p .benchmarks && $(BIN)/python -m pytest bench --benchmark-only \
	--benchmark-json=.benchmarks/last.json --benchmark-columns=median,iqr,rounds

.PHONY: help demo test test-scale lint bench bench-check fuzz quality quality-smoke clean
help:            ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1: /p' Makefile

demo: .venv/demo ## a real network forgets a class of real digits; report in demo-out/report.html
	$(BIN)/loft-fast demo --out demo-out

test: lint       ## lint, type check, all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-scale: .venv/dev ## examples and benchmarks on real engines: Flower and Ray (about three minutes)
	$(BIN)/python -m pytest -m scale tests/test_scale.py

lint: .venv/dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev ## time the package against its peers; table, and files in bench/results
	$(MEASURE)
	$(BIN)/python -m bench.report .benchmarks/last.json --save

bench-check: .venv/dev ## the same, compared with the stored ratios: fails on a regression of more than 20%
	$(MEASURE)
	$(BIN)/python -m bench.report .benchmarks/last.json --check

fuzz: .venv/dev  ## random and damaged files for every reader of files (about six minutes)
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_store_faults.py -k "foreign or changed"

quality: .venv/quality ## every method on every task of every data set; goes on where it was stopped (many hours)
	$(BIN)/python -m bench.quality.tune
	$(BIN)/python -m bench.quality.run
	$(BIN)/python -m bench.quality.page

quality-smoke: .venv/dev ## a few methods on two tasks of one data set (about three minutes)
	rm -rf .cache/quality/smoke
	$(BIN)/python -m bench.quality.run --data mnist-5000 --tasks "one class" "random 10%" --originals 0 --seeds 0 \
		--methods retrain original fine-tune paper ours "ours match" --file .cache/quality/smoke/runs.jsonl
	$(BIN)/python -m bench.quality.page --runs .cache/quality/smoke/runs.jsonl --out .cache/quality/smoke \
		--json .cache/quality/smoke/results.json

clean:           ## remove everything that was made
	rm -rf .venv build dist *.egg-info loft_fast/*.so demo-out .cache gpu-out .benchmarks .hypothesis .mypy_cache .ruff_cache \
		.pytest_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

# Stamps: a second run installs nothing. torch first and pinned: its default build brings gigabytes of CUDA along.
.venv/base: .venv/bin/python constraints.txt
	$(PIP) torch
	@touch $@

.venv/demo: .venv/base $(INPUTS)
	$(PIP) -e '.[demo]'
	@$(COMPILE)
	@touch $@

.venv/dev: .venv/base $(INPUTS)
	$(PIP) -e '.[dev]'
	@$(COMPILE)
	@touch $@

.venv/quality: .venv/dev
	$(PIP) -e '.[quality]'
	@$(COMPILE)
	@touch $@
