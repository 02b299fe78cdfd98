# Every target makes the environment first if it is missing, so `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
ARGS ?=

python := .venv/bin/python
stamp := .venv/.installed
pip := $(python) -m pip --disable-pip-version-check --no-input
linted := dspark tests notebooks paper data
nbval := --nbval-lax --nbval-current-env --nbval-cell-timeout=180 --timeout=600

.DEFAULT_GOAL := help
.PHONY: help demo lab test test-notebooks test-gpu test-gemma test-browser soak train bench proof results paper lint clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(stamp)  ## decode with DSpark and plainly, show the text, the speed-up and the notebook that did it
	$(python) -m dspark.lab.demo

lab: $(stamp)  ## open the notebooks in JupyterLab
	$(python) -m jupyter lab notebooks/00_start.ipynb

# Waiting threads yield to the other test processes.
test test-notebooks: export OMP_WAIT_POLICY = PASSIVE

test: $(stamp)  ## run the tests
	$(python) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-notebooks: $(stamp)  ## run every notebook at its defaults, asserts included
	$(python) -m pytest -q -n auto --maxprocesses 2 --dist loadfile $(nbval) notebooks

test-gpu: $(stamp)  ## test CUDA graphs and the round on the device; skipped without a GPU
	$(python) -m pytest -q -rs tests/gpu

test-gemma: $(stamp)  ## fetch a second model (Gemma-3-270M, 250 MB, under Gemma's terms of use) and test it
	DSPARK_GEMMA=1 $(python) -m pytest -q -rs tests/test_gemma.py

test-browser: $(stamp)  ## use the live notebook in JupyterLab and Chromium as a reader would
	$(pip) install --quiet --retries 1 --timeout 15 -c constraints.txt playwright axe-playwright-python || true  # tests that lack one report that they were skipped
	$(python) -m pytest -q -rs tests/browser

soak: $(stamp)  ## a minute of random arrivals, cancels and bad requests on tiny models; an hour on the real one: python -m tests.soak
	DSPARK_SOAK=60 $(python) -m pytest -q tests/test_load.py -k random_arrivals

train: $(stamp)  ## train a drafter; ARGS="--help" lists the options
	$(python) -m dspark.train $(ARGS)

bench: $(stamp)  ## measure policies against each other; ARGS="--help" lists the options
	$(python) -m dspark.bench $(ARGS)

proof: $(stamp)  ## run the long exactness checks and write data/results/proof.json; ARGS="--help" lists the parts
	$(python) -m tests.exact $(ARGS)

results: $(stamp)  ## write RESULTS.md and the table of README.md from data/results
	$(python) data/report.py

paper: $(stamp)  ## regenerate the paper's numbers, tables and figures from data/results, and its PDF where LaTeX is installed
	$(python) paper/build.py

lint: $(stamp)  ## check style and formatting
	$(python) -m ruff check $(linted)
	$(python) -m ruff format --check $(linted)

clean:  ## remove caches and build leftovers (.venv and runs/ stay)
	rm -rf build paper/build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(linted) -depth \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# The stamp is removed first and written last, so an interrupted install is resumed and never mistaken for a finished one.
# An existing environment is only replaced if its pip does not run: somebody may be working in it.
# PyTorch is installed first and alone: it is most of the download, and a reader on a slow line should see what takes so long.
$(stamp): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "dspark needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing): try make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "[1/3] making .venv with $$($(PYTHON) --version)"
	@$(pip) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "[2/3] installing PyTorch, the largest download"
	@$(pip) install --quiet -c constraints.txt torch
	@echo "[3/3] installing dspark, JupyterLab and the test tools"
	@$(pip) install --quiet -c constraints.txt -e '.[lab,train,test]'
	@touch $@
