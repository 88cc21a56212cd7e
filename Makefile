# `make demo` and `make test` are all a newcomer needs; both prepare .venv by themselves.
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
# Two busy processes whose OpenMP threads spin are tens of times slower than one thread each.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test faults lint format constraints clean

help:
	@echo "make demo    specialise the tiny MoE that ships with esft (about three minutes)"
	@echo "make test    run the tests"
	@echo "make faults  run the whole fault matrix, of which make test runs a part"
	@echo "make setup   prepare .venv only      make lint    ruff and mypy"

setup: $(STAMP)

# torch first and by exact version: a plain request for it on a machine without a GPU would bring
# gigabytes of CUDA packages. Debian's python3 lacks ensurepip, hence the second way to a venv.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "esft needs Python 3.11 or later; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
		{ rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && \
		  $(PYTHON) tools/install_pip.py $(BIN)/python; } || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup
	$(BIN)/esft demo

# One thread a test process: see OMP_WAIT_POLICY above.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

faults: setup
	ESFT_FAULTS=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: setup
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude torch --exclude pip; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
