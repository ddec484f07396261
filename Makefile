# `make test` in a clean clone sets everything up: environment, packages, models and texts.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

.PHONY: setup assets test demo check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch==2.13.0
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[onnx,serve,clients,triton,recover,evaluate,test,dev]"
	touch $@

assets: $(STAMP)
	$(PYTHON) tools/assets.py

test: assets
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile

demo: assets
	$(PYTHON) examples/demo.py

check: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy rewriter passes kernels backends tools
