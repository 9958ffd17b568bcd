# Two commands for a fresh machine: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two threads win little on models this small, and collapse when another process takes a core.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-slurm lint bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(BIN)/python -c 'import pip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
		|| $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash example/demo.sh

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Real SLURM daemons on one node, this machine: root on Debian, installs slurm-wlm and munge; some five minutes.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest tests/slurm/test_slurm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .

# Alone on an idle machine, all cores pay.
bench: export OMP_NUM_THREADS = $(shell nproc)
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv build *.egg-info runs/demo runs/tutorial
