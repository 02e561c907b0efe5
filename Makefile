# make demo and make test make .venv first. PYTHON chooses its interpreter.
PYTHON ?= python3
BIN := .venv/bin
# torch 2.11.0 is a CUDA build, which runs on a CPU too; the interpreter of its triton wants numpy below 2.4
NEWEST := torch==2.13.0 triton==3.7.1
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 "numpy<2.4"
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184  # glibc keeps freed memory

# The libraries' list, and the torch that is there: the newest torchvision may want another
define LIBRARIES
from importlib.metadata import requires, version
print(f"torch=={version('torch')}", *(r.split(";")[0] for r in requires("vcl-kernels") if "libraries" in r), sep="\n")
endef
export LIBRARIES

.PHONY: demo test check oldest oldest-headers bench gpu-check build clean

.venv/ready: pyproject.toml setup.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q --no-compile $(NEWEST)
	$(BIN)/pip install -q --no-compile "setuptools>=77" ninja
	$(BIN)/pip install -q --no-compile --no-build-isolation -e ".[demo,test]"
	touch $@

# What tests/test_libraries.py attaches to: transformers, timm, …
.venv/libraries: .venv/ready
	$(BIN)/python -c "$$LIBRARIES" | xargs -d '\n' $(BIN)/pip install -q --no-compile
	touch $@

build: .venv/ready

demo: build
	$(KEEP_MEMORY) $(BIN)/python -m examples.demo $(ARGS)

test: build .venv/libraries check
	$(BIN)/python -m vcl_kernels
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/cpu/*

.venv-oldest/ready: pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q $(OLDEST) "setuptools>=77" ninja
	touch $@

# Builds and tests a copy with the oldest versions: 5 GB of packages. The working tree's binary is not touched.
oldest: .venv-oldest/ready
	rm -rf out/oldest && mkdir -p out/oldest
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t out/oldest
	VCL_KERNELS_REQUIRE_NATIVE=1 .venv-oldest/bin/pip install -q --no-build-isolation -e "out/oldest[demo,libraries,test]" $(OLDEST)
	cd out/oldest && $(CURDIR)/.venv-oldest/bin/python -m vcl_kernels
	cd out/oldest && $(CURDIR)/.venv-oldest/bin/python -m pytest -n auto --dist loadfile $(ARGS)

# Checks in seconds that the C++ uses only what the oldest torch declares. Its smallest wheel has the same headers.
HEADERS := out/headers/$(subst ==,-,$(firstword $(OLDEST)))
WHEEL := --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 3.11 $(firstword $(OLDEST))

$(HEADERS): | .venv/ready
	rm -rf $@.partial
	$(BIN)/pip download -q -d $@.partial $(WHEEL)
	$(BIN)/python -m zipfile -e $@.partial/*.whl $@.partial
	mv $@.partial/torch/include $@
	rm -r $@.partial

oldest-headers: $(HEADERS)
	$(CXX) -std=c++20 -fsyntax-only -Wall -Wextra -Werror -I$(HEADERS) \
	  $$(grep -lE '<torch/|"tensors.h"' csrc/cpu/*.cpp)

RESULTS ?= out

bench: build
	for suite in loss activation launch networks; do \
	  $(KEEP_MEMORY) $(BIN)/python -m benchmarks.speed $$suite --out $(RESULTS) $(ARGS) || exit 1; \
	done
	for suite in loss activation; do \
	  $(BIN)/python -m benchmarks.speed $$suite --out $(RESULTS)/default-allocator $(ARGS) || exit 1; \
	done
	$(BIN)/python -m benchmarks.speed.plots $(RESULTS)

# On a machine with CUDA, which may be offline: its own Python, torch and triton.
gpu-check:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv .venv-oldest build *.egg-info vcl_kernels/_C*.so out
