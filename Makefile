# Two commands matter: `make demo` and `make test`. Each makes its own environment first; nothing is compiled.

PYTHON ?= python3
PYTHON310 ?= python3.10
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-long check format oracles oracles-waymo clean help

help:
	@echo "make demo       the whole of PICTURE on a built-in town, about 8 minutes on 2 cores; ends in demo/report.html"
	@echo "make test       quick tests, within 10 minutes     make test-long  the slow ones"
	@echo "make check      ruff and pyright                   make oracles    environment of the official nuScenes devkit"
	@echo "make oracles-waymo  environment of the official Waymo package, for more of the slow tests: needs Python 3.10, 2.5 GB"

demo: $(VENV)/.installed
	$(BIN)/picture3d demo --out demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

test-long: $(VENV)/.installed-dev oracles
	$(BIN)/python -m pytest -m long

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

oracles: .venv-oracles/.installed

oracles-waymo: .venv-waymo/.installed

clean:
	rm -rf demo runs

# torch goes first and by its exact version, so that a CPU build which is already at hand is taken and no other is pulled in.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "picture3d needs Python 3.11 or newer; try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv-oracles/.installed: constraints-oracles.txt
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oracles.txt nuscenes-devkit
	@touch $@

# The last release of the official package runs on Python 3.10 only, and with this version of protobuf only. uv resolves its
# pins in half a minute; pip does not finish.
.venv-waymo/.installed:
	$(PYTHON310) -m venv .venv-waymo
	.venv-waymo/bin/python -m pip --disable-pip-version-check install --quiet uv
	.venv-waymo/bin/uv pip install --quiet --python .venv-waymo/bin/python waymo-open-dataset-tf-2-12-0==1.6.7
	.venv-waymo/bin/uv pip install --quiet --python .venv-waymo/bin/python protobuf==3.20.3
	@touch $@
