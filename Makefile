# make demo, make test: each makes its own environment first. PYTHON chooses the interpreter for it.
PYTHON ?= python3
BIN := .venv/bin
KEEP := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184  # glibc keeps freed memory

.PHONY: demo test check bench gpu-check build clean

.venv/ready: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q "setuptools>=77" ninja
	$(BIN)/pip install -q --no-build-isolation -e ".[demo,test]"
	touch $@

build: .venv/ready

demo: build
	$(KEEP) $(BIN)/python -m benchmarks.demo $(ARGS)

test: build check
	$(BIN)/python -m vcl_kernels
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

RESULTS ?= out

bench: build
	for suite in loss activation launch networks; do \
	  $(KEEP) $(BIN)/python -m benchmarks.run $$suite --out $(RESULTS) $(ARGS) || exit 1; \
	done
	for suite in loss activation; do \
	  $(BIN)/python -m benchmarks.run $$suite --out $(RESULTS)/default-allocator $(ARGS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.plots $(RESULTS)

# On a machine with CUDA, which may be offline: its own Python, torch and triton.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf .venv build *.egg-info vcl_kernels/_C*.so out
