# Each target does all its own set-up; `make env` alone builds .venv.
.PHONY: env train test soak bench kernels lint clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
RUN    := PATH="$(BIN):$$PATH"
STAMP  := $(VENV)/.installed
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,gpu)

$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older; try: make PYTHON=python3.12" >&2; exit 2; }
	@# Debian ships venv apart; without it, fetch it rather than fail.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ command -v apt-get >/dev/null && apt-get install -y -q python3-venv python3-dev gcc g++; } || \
		{ echo "Python's venv module is missing: install python3-venv" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24' 'setuptools>=68' wheel
	@# torch first and pinned: an open range would take the newest build and gigabytes with it.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,hf,demo,dev$(GPU)]'
	@touch $@

env: $(STAMP)

train: env
	$(RUN) deepspeed train.py --config configs/zero2.json

test: env
	$(RUN) $(BIN)/python -m pytest

soak: env
	$(RUN) $(BIN)/python -m pytest tests/soak.py

bench: env
	$(RUN) $(BIN)/python -m pytest benchmarks/ --benchmark-only

# Compiles every kernel for every supported GPU, without one: none may spill or take more than its GPU has.
kernels: env
	$(RUN) mixreorg info --kernels

lint: env
	$(RUN) ruff check . && $(RUN) ruff format --check .

clean:
	rm -rf $(VENV) *.egg-info build dist
