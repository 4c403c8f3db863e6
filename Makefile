# make demo   export the two reference models and generate text from the bundles
# make test   lint, types and tests; what needs a compiler that is not here is skipped by name
# make tools  what tests of the CUDA kernels need beside compilers: CUDA programs, TensorRT's runtimes, also for aarch64
# All make .venv and install what they need into it or into build/tools. To get torch from another index:
#   make demo TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_RECIPE ?= rtn-w8a8
DEMO_PROMPT ?= 547+985=

VENV := .venv
TOOLS := build/tools
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := torch>=2.11,<2.14

.PHONY: demo test lint tools
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

# Wheels that stand alone in folders of build/tools, nothing of theirs is imported from .venv: the runtimes of two
# TensorRT releases bear one name, and nothing here is wanted where kernels are only used. nvcc comes along where the
# machine has none; it is pinned because plugins/cuda/resources.json tells what this very release makes of the kernels.
FETCH := $(PIP) install --quiet --no-deps --only-binary=:all: --upgrade --target $(TOOLS)
NVCC_WHEELS := $(foreach name,cuda-nvcc cuda-crt nvvm cuda-runtime cuda-cccl,"nvidia-$(name)==13.0.*")
AARCH64 := $(foreach glibc,2_17 2_28 2_35,--platform manylinux_$(glibc)_aarch64) --platform manylinux2014_aarch64

tools: $(TOOLS)/stamp

$(TOOLS)/stamp: $(VENV)/torch.stamp
	rm -rf $(TOOLS)
	$(FETCH)/cuda "nvidia-cuda-nvdisasm==13.*" "nvidia-cuda-cuobjdump==13.*" $(if $(shell command -v nvcc),,$(NVCC_WHEELS))
	$(FETCH)/rtx-1.7 tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116
	$(FETCH)/lean-10.16 tensorrt-lean-cu13-libs==10.16.1.11 tensorrt-lean-cu13-bindings==10.16.1.11
	$(FETCH)/lean-11.4 tensorrt-lean-cu13-libs==11.4.0.106 tensorrt-lean-cu13-bindings==11.4.0.106
	$(FETCH)/aarch64 $(AARCH64) "nvidia-cuda-runtime==13.0.*" tensorrt-lean-cu13-libs==11.4.0.106 tensorrt-rtx-cu13-libs==1.7.1.116
	touch $@

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
