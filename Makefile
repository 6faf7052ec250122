# `make run` trains all experiments at a small size and prints a table; `make test` lints and tests.
# Both first make .venv, once; it is brought up to date when the requirements change.

PYTHON ?= python3
INSTALLED := .venv/installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: run test bench adjoints gpu report

# DATA=folder takes the Speech Commands recordings from there instead of the synthetic sample. It goes to the shell as a
# variable, unexpanded, so that its name may hold any character.
override export DATA := $(value DATA)
DATA_ROOT = $(if $(DATA),--data-root "$$DATA")

run: $(INSTALLED)
	.venv/bin/python tables.py run quick $(DATA_ROOT)
	@echo 'For further commands type ". .venv/bin/activate" once, or write .venv/bin/python in place of python.'

test: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile

# How long a gradient step takes, beside torchdiffeq and diffrax, into results/gradient_step-KIND.md; DATA as above.
bench: $(INSTALLED)
	.venv/bin/python -m pip install --quiet --requirement requirements-bench.txt
	.venv/bin/python -m benchmarks.gradient_step --output results $(DATA_ROOT)

# Errors, time and memory of gradients by every way, the small half, into results/adjoints; what is there stays.
adjoints: $(INSTALLED)
	.venv/bin/python -m pip install --quiet --requirement requirements-bench.txt
	.venv/bin/python -m benchmarks.adjoints

# What a GPU gives: its tests, gradient steps with and without CUDA graphs, two epochs. Without one it ends. DATA as above.
gpu: $(INSTALLED)
	.venv/bin/python -m reproduction.gpu $(DATA_ROOT)

# One page of what is in results/, in results/report.html.
report: $(INSTALLED)
	.venv/bin/python report.py

$(INSTALLED): requirements.txt requirements-cluster.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is older than Python 3.10: set PYTHON=")'
	$(PYTHON) -m venv .venv
	@echo "Installing the requirements into .venv: some minutes, most of them for torch."
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
