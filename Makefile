# Needs make and Python 3.11 and nothing else: every target sets up its own environment, once.

PYTHON  ?= python3.11
WORKERS ?= 2

# One thread per process: the workers, and the ranks that some tests start, share the cores.
PYTEST = OMP_NUM_THREADS=1 TOST_ALLOW_SKIPS="$(1)" $(2)/bin/pytest

.PHONY: demo test test-long test-newest bench lint clean
.NOTPARALLEL:

demo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/tost compare demo --out demo --resume
	OMP_NUM_THREADS=1 .venv/bin/tost speed quickstart_compact --out demo/speed

test: .venv/installed
	$(call PYTEST,,.venv) -n $(WORKERS) --dist worksteal

test-long: .venv/installed
	$(call PYTEST,,.venv) -m long -o faulthandler_timeout=0

# The same tests beside the newest torch, which Composer, and a torchvision to match, do not allow yet.
test-newest: .venv-newest/installed
	$(call PYTEST,composer torchvision timm datasets ray,.venv-newest) -n $(WORKERS) --dist worksteal

# About 50 minutes on 2 cores that do nothing else; `.venv/bin/python benchmarks/run.py PART` measures one part.
# sparsimony and OpenVINO are contenders where they can be had; the first asks for numpy 1, and works with 2.
bench: .venv/installed
	-.venv/bin/pip install --quiet --no-deps sparsimony==0.1.0
	-.venv/bin/pip install --quiet openvino==2026.4.*
	HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/run.py

lint: .venv/installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright --pythonpath .venv/bin/python

# What make made; the results of your own runs (runs/) stay.
clean:
	rm -rf .venv .venv-newest demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[all,dev]'
	touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet torch==2.13.0 --editable '.[transformers,accelerate,test]'
	touch $@
