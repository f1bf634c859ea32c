# make demo     judge every fast operation, then fine-tune a small model on both backends
# make test     everything: lint, types, import floors, tests
# make trainer  what a release of trl can change: the tests, without those of the judge itself
#
# They set themselves up in a virtual environment in .venv. To use an interpreter that has everything already:
#     make test VENV=0 PYTHON=python3
# To choose the build of torch, such as one for another CUDA: make demo TORCH='torch==2.11.0'
# To choose the release of trl, in an environment of its own: make trainer TRL='trl==0.24.*' VENV=build/trl-0.24

PYTHON ?= python3
VENV ?= .venv
# Pinned: a range would let pip replace a build for the CPU by several gigabytes of CUDA.
TORCH ?= torch==2.13.0
TRL ?= trl

# Of packages what is imported is compiled, once: otherwise each process that imports trl takes 14 s to do so, not 7.
export PYTHONDONTWRITEBYTECODE :=

ifeq ($(VENV),0)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

.PHONY: demo test trainer lint types floors conformance bench

demo: $(READY)
	$(PY) -m conformance run --profile dev
	$(PY) examples/first_run.py

test: lint types floors $(READY)
	$(PY) -m pytest -n 2 --dist loadfile

trainer: $(READY)
	$(PY) -m unsloth_fast.cli env
	$(PY) -m pytest -n 2 --dist loadfile tests --ignore=tests/judge

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m pyright

floors: $(READY)
	$(PY) -c 'from importlinter.cli import lint_imports_command as main; main()'

conformance: $(READY)
	$(PY) -m conformance run --profile ci

bench: $(READY)
	$(PY) -m conformance bench

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile --upgrade pip
	$(PY) -m pip install -q --no-compile '$(TORCH)'
	$(PY) -m pip install -q --no-compile -e '.[demo]' --group dev '$(TRL)'
	touch $@
