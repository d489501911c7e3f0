# Two commands for a newcomer: `make demo` and `make test`. Both install first, into .venv, without root.
#
#   make install        .venv with everything locked in requirements.lock, Detectron2 and this project
#   make demo           the whole chain on the built-in sample (FAST=1: a quarter of the time)
#   make check          format, lint, types, fast tests, tables that are not stale (100 seconds on two cores)
#   make test           the tests of a clone, with an end-to-end run through both frameworks (ten minutes)
#   make test-all       what needs more: the wheel in empty environments, 2,000 hostile files, the README played (half an hour)
#   make docs           the documentation site, in build/docs
#   make bench          the programs behind every performance figure
#   make lock           requirements.lock again, from pyproject.toml

PYTHON ?= python3
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/.installed

# Without bytecode, importing torch and the frameworks costs seconds of every command.
unexport PYTHONDONTWRITEBYTECODE
export MPLBACKEND ?= Agg
# Two pytest workers with one thread each: two threads each would fight for the cores.
check test test-all: export OMP_NUM_THREADS ?= 1
# Marks of the tests that need more than a clone; `make test-all` alone runs them.
MORE := install or hostile or readme

# mypy does not follow setuptools' package-dir, so it gets a folder in which the rooms lie as they are imported.
ROOMS := contracts measure catalog pretrain converters transfer compare integrations
define types
@rm -rf .types && mkdir -p .types/twist && ln -s $(abspath $(wildcard twist/*.py) $(ROOMS)) .types/twist/
endef

LOCKED := pretrain convert compare hub onnx zoo ray wandb mlflow transfer dev docs

.PHONY: install demo check test test-all docs bench lock format clean

install: $(INSTALLED)

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The stamp is younger than everything that decides what is installed, so a second call does nothing.
$(INSTALLED): requirements.lock pyproject.toml $(wildcard third_party/detectron2/*.*) | $(UV)
	$(UV) pip install --python $(BIN)/python --quiet --compile-bytecode --require-hashes -r requirements.lock
	@# A Detectron2 that somebody put into .venv (the official git version, say) is left alone.
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)' \
	  || $(UV) pip install --python $(BIN)/python --quiet --compile-bytecode --no-deps ./third_party/detectron2
	$(UV) pip install --python $(BIN)/python --quiet --no-deps --editable .
	@# What numba compiles is kept; the first run and the tests' processes, all at once, would each spend seconds on it.
	-$(BIN)/python -c 'from twist.pretrain.data import photometric_cpu; photometric_cpu.compile_it()'
	@touch $@

demo: install
	$(BIN)/twist demo $(if $(FAST),--fast)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(types)
	MYPYPATH=.types $(BIN)/mypy -p twist
	$(BIN)/pytest -n 2 -m "not (slow or $(MORE))"
	$(BIN)/python -m twist compare --check README.md
	$(BIN)/python -m twist compare --check results/README.md
	$(BIN)/python -m benchmarks.summary --check README.md
	$(BIN)/python -m benchmarks.summary --check benchmarks/README.md

test: install
	$(BIN)/pytest -n 2 -m "not ($(MORE))"

test-all: install
	$(BIN)/pytest -n 2 -m "$(MORE)"

docs: install
	$(types)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: install
	$(BIN)/python -m benchmarks

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(UV)
	$(UV) pip compile --universal --generate-hashes --python-version 3.11 $(LOCKED:%=--extra %) --no-header --no-annotate \
	  --no-emit-package detectron2 --no-emit-package twist-suite pyproject.toml --output-file requirements.lock

clean:
	rm -rf $(VENV) *.egg-info build demo
