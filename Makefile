# make demo | test | lint | bench | info | format | wheel | clean. Everything happens in .venv, which is made on first use.
# make sanitize | fuzz | mutants | soak: longer tests; docs/trust.md says of what.
#
# PYTHON=python3.12 make test     another Python (3.10 or later)
# make test-torch TORCH=2.10      another PyTorch (2.10 or later)
# make test-triton TRITON=3.6.0   kernels compiled by another Triton; without TRITON=, by the oldest that is served
# make test-ecosystem             models of other libraries on Festina's layers; their packages take 1.2 GB
# make demo ARGS="--steps 200"    arguments for the program behind a target
# make fuzz SECONDS=600           how long to fuzz, or to soak
#
# Packages come from wherever pip (or uv, if it is installed) is set to look.

PYTHON ?= python3
ARGS ?=
JOBS ?= auto

# TORCH=2.10 takes the last 2.10.x; each PyTorch but the usual one has an environment of its own.
USUAL := $(shell sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
TORCH ?= $(USUAL)
WANTED := torch==$(TORCH)$(if $(word 3,$(subst ., ,$(TORCH))),,.*)
TRITON ?= 3.6.0
VENV := .venv$(if $(filter-out $(USUAL),$(TORCH)),-torch-$(TORCH))
PY := $(VENV)/bin/python
UV := $(shell command -v uv 2>/dev/null)
CPP := $(shell find csrc -name '*.h' -o -name '*.cc')
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# $(call install,ARGUMENTS): with uv where there is one, and with pip where there is none or uv finds no such package.
ifdef UV
install = $(UV) pip install --python $(PY) $(1) || $(PY) -m pip install $(1)
else
install = $(PY) -m pip install $(1)
endif

SECONDS ?= 600

.DEFAULT_GOAL := help
.PHONY: help setup info demo bench test sanitize fuzz mutants soak test-torch test-triton test-ecosystem lint format wheel \
  clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '1,11s/^# \{0,1\}//p' Makefile

# Three stamps, so that a change costs only what it must: the environment, torch, and festina with its tools.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	  "festina needs Python 3.10 or later, but $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	$(if $(UV),$(UV) venv --seed --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  $(VENV),$(PYTHON) -m venv $(VENV))
	@touch $@

# torch first and on its own: it is the one large download, and a failure here says so plainly.
$(VENV)/.torch-$(TORCH): $(VENV)/.made
	$(call install,'$(WANTED)')
	@touch $@

# Editable: an edited Python file is what runs. The compiled core is built again when one of its sources has changed.
$(VENV)/.installed: $(VENV)/.torch-$(TORCH) $(SOURCES)
	@sed 's/^torch==.*/$(WANTED)/' constraints.txt > $(VENV)/constraints.txt
	$(call install,--constraint $(VENV)/constraints.txt --editable '.[dev]')
	@touch $@

setup: $(VENV)/.installed

info: setup
	@$(PY) -m festina info $(ARGS)

demo: setup
	@$(PY) -m festina demo $(ARGS)

bench: setup
	@$(PY) -m festina bench $(ARGS)

# One thread per worker: the workers already fill the cores. One that is idle takes over what another has not begun.
test: setup
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS)

# The core under AddressSanitizer and UndefinedBehaviorSanitizer, which end the run at the first error: csrc/tests, a slice of
# the suite, random calls. Then threads under ThreadSanitizer, on a stand-in for OpenMP, as it cannot see into libgomp. One
# instruction set, `wide` (AVX-512's kernels on AVX2), in one library. Checks of each single address are left to
# AddressSanitizer: with UndefinedBehaviorSanitizer's, compiling takes several times as long. For x86-64 with AVX2.
SANITIZE := build/sanitize
COMPILED := g++ -std=gnu++17 -O1 -g1 -march=x86-64-v3 -Wno-psabi -fno-math-errno -fno-trapping-math -fno-omit-frame-pointer
SANITIZED := $(COMPILED) -fsanitize=address,undefined -fno-sanitize=null,alignment,object-size,pointer-overflow \
  -fno-sanitize-recover=all
CORE := -fPIC -shared -fvisibility=hidden -DFESTINA_TESTING csrc/api.cc csrc/dispatch.cc csrc/isa/wide.cc
preloaded = LD_PRELOAD="$(foreach name,$(1),$(shell g++ -print-file-name=lib$(name).so))"
ASAN := FESTINA_CORE=$(SANITIZE) FESTINA_POOL_MB=0 $(call preloaded,asan stdc++) ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1
TSAN := FESTINA_CORE=$(SANITIZE)/threads FESTINA_POOL_MB=0 $(call preloaded,tsan) OMP_NUM_THREADS=1

sanitize: setup
	$(MAKE) --jobs=2 $(SANITIZE)/libfestina_core.so $(SANITIZE)/test_core $(SANITIZE)/threads/libfestina_core.so
	$(SANITIZE)/test_core
	$(ASAN) $(PY) -m pytest -p no:cacheprovider --numprocesses 2 tests/test_backends.py tests/test_call.py tests/cpu \
	  -k "$(SLICE)" $(ARGS)
	$(ASAN) $(PY) tests/fuzz.py calls wrong structs --seconds 60
	$(TSAN) $(PY) -m pytest -p no:cacheprovider -p no:xdist tests/cpu -k "share_the_work or in_several or end_together"

# Odd widths with every feature; threads, segments of long sequences, bfloat16; calls made by hand; calls that are ended.
SLICE := cpu and matches_reference and (H9 or H63) or share_the_work or in_several or every_instruction_set or \
  a_wrong_call or right_calls or of_other_outputs or is_not_trusted or without_numbers or end_together

fuzz: setup
	$(PY) tests/fuzz.py --seconds $(SECONDS) $(ARGS)

mutants: setup
	$(PY) tests/mutants.py $(ARGS)

soak: setup
	$(PY) tests/soak.py --seconds $(SECONDS) $(ARGS)

$(SANITIZE)/libfestina_core.so: $(SOURCES)
	@mkdir -p $(@D)
	$(SANITIZED) $(CORE) -lgomp -o $@

$(SANITIZE)/test_core: $(SOURCES)
	@mkdir -p $(@D)
	$(SANITIZED) -DISA=wide '-DVECTOR_HEADER="../simd/wide.h"' csrc/tests/test_core.cc -o $@

$(SANITIZE)/threads/libfestina_core.so: $(SOURCES)
	@mkdir -p $(@D)
	$(COMPILED) -fsanitize=thread $(CORE) csrc/tests/threads.cc -pthread -o $@

# Lint belongs to the usual PyTorch; the suite runs on any.
test-torch: test

# A CUDA build of torch brings a Triton of its own, often an older one: torch 2.10 and 2.11 bring 3.6.0.
test-triton: setup $(VENV)/triton-$(TRITON)/.made
	PYTHONPATH=$(VENV)/triton-$(TRITON) $(PY) -c 'import triton; assert triton.__version__ == "$(TRITON)", triton'
	PYTHONPATH=$(VENV)/triton-$(TRITON) $(PY) -m pytest --numprocesses $(JOBS) --dist worksteal $(ARGS) tests/test_triton.py -k compile

$(VENV)/triton-$(TRITON)/.made: $(VENV)/.made
	$(PY) -m pip install --quiet --no-deps --upgrade --target $(@D) triton==$(TRITON)
	@touch $@

# Other libraries, in an environment that sees the usual one's packages. Each is installed on its own: one that does not go
# with this Python and torch is named, and its tests are skipped. A file per worker, as the libraries take long to import.
ECOSYSTEM := $(VENV)-ecosystem
LIBRARIES := tests/ecosystem/libraries.txt

test-ecosystem: $(ECOSYSTEM)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(ECOSYSTEM)/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile \
	  --disable-warnings $(ARGS) tests/ecosystem

$(ECOSYSTEM)/.installed: $(VENV)/.installed $(LIBRARIES)
	$(PY) -m venv --clear --without-pip $(ECOSYSTEM)
	@usual=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(ECOSYSTEM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$usual')" > "$$own/usual.pth"
	@for library in $$(sed 's/#.*//' $(LIBRARIES)); do \
	  echo "installing $$library"; \
	  $(ECOSYSTEM)/bin/python -m pip install --quiet --constraint $(VENV)/constraints.txt "$$library" || \
	    echo "$$library does not install here: its tests will be skipped"; \
	done
	@touch $@

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/codespell

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CPP)

wheel: setup
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV) $(ECOSYSTEM)
