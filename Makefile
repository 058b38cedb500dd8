# make train | test | test-all | torture | test-newest | test-oldest | bench | report | gpu-wheels
# make lint | format | clean
# Each makes the environment it needs first: .venv, .venv-newest or .venv-oldest.
#
# PYTHON=python3.12           the interpreter that environments are made with
# PIP_FLAGS="--extra-index-url URL" to pip, for a CPU-only or other build of torch (see README.md)
# ARGS="--max-minutes 1"      passed to the command

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two processes of one thread each; tests of threads set their number. A file's tests stay together,
# and files in order: the last ones are short.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: train test test-all torture test-newest test-oldest bench report gpu-wheels lint format check clean

train: $(VENV)/.installed
	$(BIN)/python -m fastlm.train --compile $(ARGS)

test: $(VENV)/.installed $(VENV)/.extras
	$(PYTEST) $(ARGS)

# The sweeps that `make test` samples, too.
test-all: $(VENV)/.installed $(VENV)/.extras
	$(PYTEST) -m "" $(ARGS)

# Kills, damage, full disks (as root) and fuzz cases by the hundred; about 15 minutes.
torture: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py $(ARGS)

# The same suite with the newest versions that the package index serves, and with the lowest that
# pyproject.toml admits.
test-newest: BIN := $(VENV)-newest/bin
test-newest: $(VENV)-newest/.installed $(VENV)-newest/.extras
	$(PYTEST) $(ARGS)

test-oldest: BIN := $(VENV)-oldest/bin
test-oldest: $(VENV)-oldest/.installed
	$(PYTEST) $(ARGS)

# Each state of the allocator in a process of its own. ARGS="--results bench/results/cpu-DATE" keeps
# the figures, and report makes bench/RESULTS.md and README's table of all that are kept.
bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only --allocator as-is $(ARGS)
	$(BIN)/python -m pytest bench --benchmark-only --allocator kept $(ARGS)

report: $(VENV)/.installed
	$(BIN)/python bench/report.py

# What bench/gpu.sh takes along to a machine without a package index, for its Python 3.12, into .gpu:
# pure Python wheels (Liger without its dependencies, which torch and triton are), the demo's corpus,
# and nanoGPT's files from NANOGPT=DIR.
GPU_WHEELS = tyro docstring-parser typeguard typing-extensions liger-kernel
gpu-wheels: $(VENV)/.installed
	rm -rf .gpu/wheels .gpu/corpus .gpu/nanoGPT
	$(PYTHON) -m pip download --quiet $(PIP_FLAGS) --no-deps --only-binary=:all: --python-version 3.12 -c constraints.txt -d .gpu/wheels $(GPU_WHEELS)
	$(BIN)/python -c 'import shutil; from fastlm.corpus import default_corpus; shutil.copytree(default_corpus(), ".gpu/corpus")'
	test -z "$(NANOGPT)" || { mkdir .gpu/nanoGPT && cp $(NANOGPT)/*.py .gpu/nanoGPT/; }
	du -sh .gpu/wheels .gpu/corpus

# mypy sees the package as a wheel has it, with kernels/ inside.
lint: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed/fastlm && ln -s $(CURDIR)/fastlm/* $(CURDIR)/kernels build/typed/fastlm
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.inc csrc/*.cpp tests/csrc/*.h tests/csrc/*.cpp

format: $(VENV)/.linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.inc csrc/*.cpp tests/csrc/*.h tests/csrc/*.cpp

# The extension is built anew when its sources change; the Python files are used where they stand.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*) | check
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e ".[test]"
	touch $@

# What the integrations, the trackers, the notebook and the packages are tested with. Where the
# package index has one not, its tests are skipped. The large ones are installed by test-newest alone.
EXTRAS = transformers accelerate tensorboard wandb pyarrow zstandard twine cibuildwheel
$(VENV)-newest/.extras: EXTRAS += lightning trackio nbformat nbclient ipykernel
$(VENV)/.extras $(VENV)-newest/.extras: %/.extras: %/.installed
	for package in $(EXTRAS); do \
		$(@D)/bin/python -m pip install --quiet --retries 1 --timeout 20 $(PIP_FLAGS) \
			$(if $(filter $(VENV),$*),-c constraints.txt,--upgrade) \
			$$package || echo "$$package: not installed, its tests are skipped"; \
	done
	touch $@

$(VENV)-newest/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*) | check
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(PIP_FLAGS) -e ".[test]"
	touch $@

# "numpy>=1.26" in pyproject.toml becomes the constraint "numpy==1.26", for the build, too.
# Constraints have no extras: "a[b]>=1.0" becomes "a==1.0".
$(VENV)-oldest/.installed: pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*) | check
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	sed -n 's/^ *"\([a-z0-9-]*\)\(\[[a-z]*\]\)*>=\([0-9.]*\)[^"]*",*$$/\1==\3/p' pyproject.toml > $(@D)/constraints.txt
	PIP_CONSTRAINT=$(@D)/constraints.txt $(@D)/bin/python -m pip install --quiet $(PIP_FLAGS) -e ".[test]"
	touch $@

$(VENV)/.linters: pyproject.toml constraints.txt | check
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt ruff clang-format mypy torch numpy
	touch $@

# What the recipes above stand on, each with how to get it.
check:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.10 or later (Debian, Ubuntu: apt-get install python3)"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than 3.10: name another, as in make train PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: $(PYTHON) has no venv: install it (Debian, Ubuntu: apt-get install python3-venv)"; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { echo "error: the headers of $(PYTHON) are missing: install them (Debian, Ubuntu: apt-get install python3-dev)"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "error: no C++ compiler found: install one (Debian, Ubuntu: apt-get install g++), or name it in CXX"; exit 2; }

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest build dist *.egg-info fastlm/_C.*.so
