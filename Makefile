# `make demo` and `make test` are all a newcomer needs; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo demo-full test lint docs dist clean

install: $(VENV)/.installed

# Bytecode is compiled here, once: else each of the tests' processes does it where PYTHONDONTWRITEBYTECODE is set.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hybriddit needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) makes no virtual environment: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/hybriddit demo

demo-full: install
	$(BIN)/python scripts/ablation.py --out outputs/ablation/full --set train.steps=1300 data.images=960 \
		--rows default "window only" "linear only" "LinFusion's far branch"

# in as many processes as there are cores, four at the most: each holds torch and diffusers
test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: install
	$(BIN)/python scripts/make_api_docs.py

# PYTHONS="3.11 3.12 3.13" tries the wheel on each
PYTHONS ?= $(BIN)/python
dist: install
	scripts/smoke_wheel.sh $(PYTHONS)

clean:
	rm -rf $(VENV) outputs dist build
