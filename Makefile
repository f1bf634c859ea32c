# make demo         judge every fast operation by eight properties, then fine-tune a small model on both backends
# make test         everything: lint, types, import rules, tests
# make trainer      all tests except those of the judge, to test another release of trl
# make conformance  judge every fast operation as in CI
# make bench        time the operations; needs a GPU
# make figures      render every figure of the documents from docs/results and ledger/
#
# Each command creates its environment in .venv. Other environments:
#     make test VENV=0 PYTHON=python3                       an existing one
#     make demo TORCH='torch==2.11.0'                       another build of torch, such as for another CUDA version
#     make trainer TRL='trl==0.24.*' VENV=build/trl-0.24    another release of trl

PYTHON ?= python3
VENV ?= .venv
# Pinned, because pip could replace a CPU build by several gigabytes of CUDA to satisfy a range.
TORCH ?= torch==2.13.0
TRL ?= trl

# Python writes bytecode of what is imported: without it every process that imports trl takes 14 s to do so, not 7.
export PYTHONDONTWRITEBYTECODE :=

ifeq ($(VENV),0)
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

# The properties of the demo: those that most wrong kernels break.
QUICK := value gradients metadata inputs_untouched determinism guard_writes guard_reads error_parity

# What was measured about the judge and the gate.
POWER := docs/results/power

.PHONY: demo test suite trainer lint types floors conformance bench figures

demo: $(READY)
	$(PY) -m conformance run --profile dev --dtype float32 --property $(QUICK)
	$(PY) examples/first_run.py

# Two at a time, as pyright would leave a core idle for a minute.
test: $(READY)
	$(MAKE) --no-print-directory --jobs=2 lint floors types suite

suite: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

trainer: $(READY)
	$(PY) -m unsloth_fast.cli env
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests --ignore=tests/judge

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

figures: $(READY)
	$(PY) docs/figures.py
	$(PY) -m tests.judge.power write $(addprefix $(POWER)/,wrong_cpu.json wrong_cpu_2.json right_h200.json liger_cpu.json liger_cpu_2.json mutants_cpu.json survivors.toml)
	$(PY) -m tests.judge.power write-gate $(sort $(wildcard $(POWER)/gates_*.json))

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-compile --upgrade pip
	$(PY) -m pip install -q --no-compile '$(TORCH)'
	$(PY) -m pip install -q --no-compile -e '.[train,demo]' --group dev '$(TRL)'
	touch $@
