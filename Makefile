# Every target sets up what it needs: `make demo` on a fresh clone is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test test-avx2 test-slow test-slurm chaos lint style types documented check bench gpu-check docs claims judge clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## create .venv with everything that runs, tests and checks need

$(READY): pyproject.toml constraints.txt
	$(PYTHON) scripts/setup.py $(VENV)
	@touch $@

demo: $(READY) ## the main job on the embedded corpus: SP beside muP, with verdicts and a report
	$(BIN)/mupsweep run experiment=demo parametrization=sp,mup

smoke: $(READY) ## the same path on the smallest models, in seconds
	$(BIN)/mupsweep run experiment=smoke

test: $(READY) ## the tests
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-avx2: $(READY) ## the numeric tests as a CPU without AVX-512 rounds; nothing to do on such a CPU
	@if $(BIN)/python -c "import torch; exit(torch.backends.cpu.get_cpu_capability() != 'AVX512')"; then \
		$(AVX2) $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal tests/optimizers tests/models; \
	else echo "no AVX-512 here: make test has run them so"; fi

test-slow: $(READY) ## the drills that take minutes
	$(BIN)/python -m pytest -q -m slow

test-slurm: $(READY) ## a Slurm cluster on this machine: limits, preemption, dead nodes, cancellation (minutes)
	$(BIN)/python -m pytest -q -m slurm -rs tests/slurm

MINUTES ?= 10
chaos: $(READY) ## kill, stop and damage whatever trains for MINUTES=10; the results must be those of an undisturbed sweep
	$(BIN)/python scripts/chaos.py --minutes $(MINUTES)

lint: types style documented ## ruff, pyright, import layers, generated documentation

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

documented: $(READY)
	$(BIN)/python scripts/readme.py --check

check: lint test ## everything that must be green before a commit

bench: $(READY) ## training speed against transformers, overheads of the runner
	$(BIN)/python scripts/bench.py

DEVICE ?= cuda:0
gpu-check: $(READY) ## bits, resume, every optimizer, memory and speed on a GPU, in 8 minutes; DEVICE=cpu rehearses it
	$(BIN)/python -W ignore scripts/gpu_check.py --device $(DEVICE)

docs: $(READY) ## write the README's generated blocks anew
	$(BIN)/python scripts/readme.py

claims: $(READY) ## train what tries the claims of the works, and write configs/experiment/CLAIMS.md (hours; resumable)
	$(BIN)/python scripts/claims.py train

judge: $(READY) ## how good the answers are on public sweeps: figures, bars, and tests/tables/JUDGED.md with pictures
	$(BIN)/python scripts/judge.py --page tests/tables/JUDGED.md

clean: ## remove what was built; sweeps/ stays
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
