# Each target sets up .venv by itself; the second time that takes no time.
PYTHON ?= python3
RUN := .venv/bin/python
DEMO := demo-output
# make setup TORCH=cpu, or a CUDA version such as TORCH=cu126, takes that build of torch from
# PyTorch's own index; without it pip takes what its index has, on Linux the build for CUDA.
TORCH ?=
TORCH_INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: demo test test-slow check bench setup clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) --constraint constraints.txt ".[dev]"
	@rm -rf build shardtune.egg-info
	@touch $@

setup: .venv/ready

demo: .venv/ready
	$(RUN) cli.py demo --out $(DEMO)

test: .venv/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest $(PARALLEL) -m "not slow"

test-slow: .venv/ready
	HF_HUB_OFFLINE=1 $(RUN) -m pytest $(PARALLEL) -m slow

# What a CPU can measure, at small sizes, in less than five minutes; docs/benchmarks.md has the rest.
bench: .venv/ready
	$(RUN) -m benchmarks.read --quick
	$(RUN) -m benchmarks.train_step --rounds 5
	$(RUN) -m benchmarks.peers --quick
	$(RUN) -m benchmarks.estimates
	$(RUN) -m benchmarks.allocations

check: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(DEMO) benchmark-output benchmark-work build shardtune.egg-info .mypy_cache .pytest_cache .ruff_cache
