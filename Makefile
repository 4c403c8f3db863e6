# make demo   export the two reference models and generate text from the bundles
# make test   lint, types and tests
# Both make .venv and install all they need into it. To get torch from another index:
#   make demo TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_RECIPE ?= rtn-w8a8
DEMO_PROMPT ?= 547+985=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch>=2.11,<2.14

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(VENV)/export.stamp
	$(BIN)/dllmc export builtin:tiny-llada --recipe $(DEMO_RECIPE) -o exported/demo-llada --force
	$(BIN)/dllmc run exported/demo-llada --prompt "$(DEMO_PROMPT)"
	$(BIN)/dllmc export builtin:tiny-dream --recipe $(DEMO_RECIPE) -o exported/demo-dream --force
	$(BIN)/dllmc run exported/demo-dream --prompt "$(DEMO_PROMPT)"

# Two workers of one thread each: with more, torch's threads fight for the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first, from its own index where one is named, so that the later installs find it there.
$(VENV)/torch.stamp: Makefile
	@$(PYTHON) -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit(f"dllmc needs Python 3.11 or newer, found {v[0]}.{v[1]}; pass PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	touch $@

$(VENV)/export.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet --editable ".[export]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install --quiet --editable ".[dev]"
	touch $@
