# `make demo` and `make test` set everything up in .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Old packages beside new ones that they stand on say what will be gone one day.
OLD := -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning

.PHONY: demo test unit lint types wheel floors audit bench zoo clean

demo: $(INSTALLED)
	$(BIN)/se-inject demo --out model.pt

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

unit: $(INSTALLED)  ## the fast tests alone
	$(BIN)/python -m pytest -n 2 -m "not zoo and not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --wheel

floors:  ## the tests with the oldest packages that pyproject.toml allows, in an environment of their own
	rm -rf .floors
	$(PYTHON) -m venv .floors
	.floors/bin/python -m pip install --quiet uv
	.floors/bin/uv pip install --python .floors/bin/python --resolution lowest-direct --editable '.[dev]' 'pyarrow<22'
	.floors/bin/python -m tests.floors
	.floors/bin/python -m pytest -n 2 -p no:cacheprovider $(OLD)

audit: $(INSTALLED)  ## known vulnerabilities of the packages in .venv; asks PyPI
	$(BIN)/python -m pip freeze --exclude-editable >.venv/audit.txt
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement .venv/audit.txt

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.surgery --out benchmarks/results/surgery.json

zoo: $(INSTALLED)  ## every network of timm and torchvision
	$(BIN)/python -m tests.zoo --jobs 2 --out benchmarks/results/zoo.json

clean:
	rm -rf .venv .floors dist

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "se-inject needs Python 3.11 or newer; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(INSTALLED)
