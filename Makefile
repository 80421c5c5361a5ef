# Works with any POSIX sh and GNU make from 3.81 on. Another Python: make PYTHON=python3.12
PYTHON ?= python3
PY = .venv/bin/python
READY = .venv/ready

.PHONY: help demo test notebooks lint bench clean

help:
	@echo "make demo       train a small diffusion model on handwritten digits and draw new ones"
	@echo "make test       all tests"
	@echo "make notebooks  run every notebook from top to bottom"
	@echo "make lint       style and types"
	@echo "make bench      measure what the README claims"
	@echo "make clean      remove .venv, outputs and caches; downloaded weights and data stay"

demo: $(READY)
	$(PY) models/ddpm.py
	@echo "look at outputs/ddpm/film.png: digits growing out of noise"

test: $(READY)
	$(PY) -m pytest -n 2

notebooks: $(READY)
	$(PY) -m pytest -v tests/notebooks.py

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: $(READY)
	$(PY) models/bench.py
	$(PY) finetune/bench.py
	$(PY) training/bench.py
	$(PY) rag/bench.py

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
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt -e '.[dev]'
	@touch $(READY)
