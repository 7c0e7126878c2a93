# Needs make and Python 3.11 and nothing else: every target sets up its own environment, once.

PYTHON  ?= python3.11
WORKERS ?= 2

# One thread per process: the workers, and the ranks that some tests start, share the cores.
PYTEST = OMP_NUM_THREADS=1 TOST_ALLOW_SKIPS="$(1)" $(2)/bin/pytest

.PHONY: demo test test-long test-newest docs bench lint clean
.NOTPARALLEL:

demo: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/tost compare demo --out demo --resume
	OMP_NUM_THREADS=1 .venv/bin/tost speed quickstart_compact --out demo/speed

test: .venv/installed
	$(call PYTEST,,.venv) -n $(WORKERS) --dist worksteal

test-long: .venv/installed
	$(call PYTEST,,.venv) -m long -o faulthandler_timeout=0

# The same tests beside the newest torch, Composer's too: it pins an older one, and works here (docs/adapters.md).
test-newest: .venv-newest/installed
	PYTHONWARNINGS='ignore:Failed to load image' $(call PYTEST,timm datasets ray,.venv-newest) -n $(WORKERS) --dist worksteal

# The site, in site/; a link or an anchor that leads nowhere fails it (with --quiet none would: what is not shown is not
# counted). Look at it: python3 -m http.server -d site
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

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
	rm -rf .venv .venv-newest demo site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[all,dev]'
	touch $@

# What mosaicml imports, and then mosaicml without its pins. It imports torchvision, whose releases from 0.17 on cannot be imported
# where their compiled half does not fit, as beside a torch without CUDA; 0.16.2 can, and has what mosaicml asks of it.
.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet torch==2.13.0 --editable '.[transformers,accelerate,lightning,test]' \
		'mosaicml-cli>=0.5.25,<0.8' 'torchmetrics>=1.0,<1.7.5' 'torch_optimizer>=0.3,<0.4' 'coolname<3' 'importlib-metadata<9' \
		'psutil<8' 'py-cpuinfo<10' 'requests<3' 'tabulate==0.9.0'
	.venv-newest/bin/pip install --quiet --no-deps mosaicml==0.32.1 torchvision==0.16.2
	touch $@
