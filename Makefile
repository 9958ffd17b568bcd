# Two commands for a fresh machine: `make demo` and `make test`. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Two threads gain little on models this small, and slow down badly when another process takes a core.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-slurm test-speech test-runtime lint bench clean

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

# Starts real SLURM daemons on this machine. Needs root on Debian; installs slurm-wlm and munge. Five minutes.
test-slurm: $(INSTALLED)
	$(BIN)/python -m pytest tests/slurm/test_slurm.py

# Word times on real speech: AUDIO is the wav of the tests in tests/speech, WHISPER a tiny.en model as .pt.
test-speech: $(INSTALLED)
	AUDIO="$(AUDIO)" WHISPER="$(WHISPER)" $(BIN)/python -m pytest tests/speech

# NVIDIA's runtime beside ours: PERSONAPLEX is a clone of github.com/NVIDIA/personaplex. Two minutes.
test-runtime: $(INSTALLED)
	PERSONAPLEX="$(abspath $(PERSONAPLEX))" $(BIN)/python -m pytest tests/runtime

lint: $(INSTALLED)
	$(BIN)/ruff check .

# Run it alone on an idle machine: it uses all cores.
bench: export OMP_NUM_THREADS = $(shell nproc)
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv build *.egg-info runs/demo runs/tutorial
