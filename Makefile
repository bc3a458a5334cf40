# Each target installs what it needs; `make env` only builds .venv.
.PHONY: env train test check fast soak bench kernels lint clean compiler

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
RUN    := PATH="$(BIN):$$PATH"

DRIVER := $(firstword $(subst ., ,$(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)))
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,gpu)
# CUDA of PyTorch's build: what .venv was built for; else 13, which needs driver 580, or 12, which needs driver 525.
BUILT  := $(patsubst $(VENV)/.installed-cuda%,%,$(wildcard $(VENV)/.installed-cuda1[23]))
CUDA   := $(or $(BUILT),$(shell test "$(DRIVER)" -lt 580 2>/dev/null && echo 12 || echo 13))
STAMP  := $(VENV)/.installed-cuda$(CUDA)
PINS   := $(if $(filter 12,$(CUDA)),constraints-cuda12.txt,constraints.txt)
TRAIN  := $(if $(filter 12,$(CUDA)),train-cuda12,train)

# Package names of Debian's python3.x carry its version.
VERSION = $$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
HEADERS = $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h")))'
# $(call apt,packages): whether they could be installed. A fresh container has no lists of packages yet.
apt = { command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && \
	{ apt-get install -y -q $(1) || { apt-get update -q && apt-get install -y -q $(1); }; }; } >&2

# With a GPU every command needs the compiler. On a CPU only tests and benchmarks do, because they compile graphs.
$(STAMP): setup.py pyproject.toml $(PINS) constraints-common.txt $(if $(GPU),| compiler)
	@case "$(CUDA)" in 12|13) ;; *) echo "CUDA=$(CUDA): expected 12 or 13" >&2; exit 2 ;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older; try: make PYTHON=python3.12" >&2; exit 2; }
	@# Debian packages venv separately; install it if it is missing.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(call apt,python$(VERSION)-venv) || \
		{ echo "Python's venv module is missing: install python$(VERSION)-venv" >&2; exit 2; }
	@# An environment for the other CUDA holds DALI's other distribution in the same folders, so rebuild it.
	@test -z "$(filter-out $(CUDA),$(BUILT))" || rm -rf $(VENV)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24' 'setuptools>=77' wheel
	@# torch first and pinned: an open range would take the newest build and gigabytes with it.
	$(BIN)/python -m pip install --quiet -c $(PINS) torch==$$(sed -n 's/^torch==//p' $(PINS))
	@# Without the variable, DeepSpeed's set-up asks for nvcc if PyTorch sees a GPU. It compiles nothing in either case.
	DS_IGNORE_CUDA_DETECTION=1 $(BIN)/python -m pip install --quiet -c $(PINS) --no-build-isolation \
		-e '.[$(TRAIN),hf,demo,s3,onnx,dev$(GPU)]'
	@touch $@

env: $(STAMP)

# Triton compiles C against Python.h when it first runs on a GPU, and torch.compile C++ on a CPU.
compiler:
	@{ command -v "$${CC:-gcc}" || command -v clang; } >/dev/null && command -v "$${CXX:-g++}" >/dev/null && $(HEADERS) || \
		$(call apt,gcc g++ python$(VERSION)-dev) && $(HEADERS) || \
		{ echo "A C compiler or Python.h is missing: install gcc, g++ and python$(VERSION)-dev" >&2; exit 2; }

train: env
	$(RUN) mixreorg train zero2

# Two files at a time: faster on two cores, in the order that tests/conftest.py gives. One on a GPU: the largest tests take
# most of its memory.
PYTEST := $(BIN)/python -m pytest $(if $(GPU),,-n 2 --dist loadfile --no-loadscope-reorder)

test: env compiler
	$(RUN) $(PYTEST)

soak: env
	$(RUN) $(BIN)/python -m pytest tests/soak.py

bench: env compiler
	$(RUN) $(BIN)/python -m pytest benchmarks/ --benchmark-only

# Compiles every kernel for every supported GPU architecture; needs no GPU. Fails if a kernel spills, needs more than its GPU
# has or shows a known compiler bug. Then compiles with the oldest Triton (of PyTorch 2.10 and 2.11), where a few spill.
OLDEST := $(abspath $(VENV))/oldest-triton
kernels: env
	$(RUN) mixreorg info --kernels
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OLDEST) -c constraints-cuda12.txt triton
	$(RUN) PYTHONPATH=$(OLDEST) python -m mixreorg_fast.resources --architectures 80 90 --check > $(OLDEST).jsonl

# Lint and the fast tier side by side: about two minutes on two idle cores.
check: env
	$(MAKE) --no-print-directory -j2 -O lint fast

# Tests that neither compile nor start this package in another process.
fast: env
	$(RUN) $(PYTEST) -m "not slow and not launch and not browser"

lint: env
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) basedpyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) *.egg-info build dist
