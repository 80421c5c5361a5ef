# Works with any POSIX sh and GNU make from 3.81 on. Another Python: make PYTHON=python3.12
PYTHON ?= python3
PY = .venv/bin/python
READY = .venv/ready

.PHONY: help demo test test-all notebooks lab lint bench gpu clean

help:
	@echo "make demo       four results from the shipped weights in a few minutes: outputs/demo/index.html"
	@echo "make test       the quick tests, ten minutes on two cores"
	@echo "make test-all   all tests"
	@echo "make notebooks  run every notebook from top to bottom"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make lint       style and types"
	@echo "make bench      measure the speeds in docs/BENCHMARKS.md and the maps"
	@echo "make gpu        measure what needs a GPU, in at most eight minutes, and write it there"
	@echo "make clean      remove .venv, outputs and caches; downloaded weights and data stay"

demo: $(READY)
	$(PY) -m utils.demo

test: $(READY)
	$(PY) -m pytest -n 2 -m "not long" --times 10

test-all: $(READY)
	$(PY) -m pytest -n 2 --times 10

notebooks: $(READY)
	$(PY) -m pytest -n 2 --times 10 tests/notebooks.py

lab: $(READY)
	$(PY) -m jupyter lab notebooks

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: $(READY)
	$(PY) models/bench.py
	$(PY) finetune/bench.py
	$(PY) training/bench.py
	$(PY) rag/bench.py
	$(PY) deploy/kv_cache.py
	$(PY) deploy/engine_study.py
	$(PY) deploy/speculative.py
	$(PY) deploy/quantize.py
	$(PY) deploy/low_bit.py

gpu: $(READY)
	$(PY) vlm/gpu_bench.py --write

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A file and not a phony target: as long as it is newer than both lists, nothing is installed.
$(READY): requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): install Python 3.11 or newer, or say make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed and $(PYTHON) is older: say make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "this Python cannot make environments: install the Debian package python3-venv"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing into .venv: some 2.8 GB with the CPU build of torch, minutes on a quick line"
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt -e '.[dev]'
	@touch $(READY)
