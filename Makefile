# Two commands for a fresh machine: `make demo` and `make test`. Both install into .venv first.
# With TORCH=newest, every command works in .venv-newest, where torch is the newest one: moshi's pin is left out.
PYTHON ?= python3
ifneq ($(filter-out newest,$(TORCH)),)
$(error TORCH=$(TORCH): the only other torch is TORCH=newest)
endif
VENV := .venv$(if $(TORCH),-$(TORCH))
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# GB of it
SIZE := 8
# Two threads gain little on models this small, and slow down badly when another process takes a core.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-slurm test-speech test-runtime gpu-check gpu-wheels lint bench clean

install: $(INSTALLED)

# What pip installs. For the newest torch, both packages without their dependencies first; then what these are, without
# moshi, without a limit on torch, and without what needs the torchaudio of an older torch.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off
INSTALL := $(PIP) --editable '.[dev]'
ifeq ($(TORCH),newest)
INSTALL := $(PIP) --no-deps --editable . 'moshi>=0.2.13,<0.3' \
	&& $(BIN)/python -c "$$UNPINNED" > $(VENV)/unpinned.txt && $(PIP) --upgrade --requirement $(VENV)/unpinned.txt
endif
define UNPINNED
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for package, extra in (('moshi-personaplex-finetune', 'dev'), ('moshi', '')):
    for wanted in map(Requirement, requires(package)):
        here = wanted.marker is None or wanted.marker.evaluate({'extra': extra})
        if here and wanted.name not in ('moshi', 'stable-ts', 'torchaudio'):
            print(wanted.name, '' if wanted.name == 'torch' else wanted.specifier)
endef
export UNPINNED

# pip unpacks in silence: the loop says every few seconds how far it is, until the shell that waits for pip has gone.
$(INSTALLED): pyproject.toml
	@$(BIN)/python -c 'import pip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null \
		|| { echo "making $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing into $(VENV): about $(SIZE) GB, most of it torch with CUDA; 3 to 10 minutes"
	@start=$$(date +%s); \
	while sleep 6 && kill -0 $$$$ 2>/dev/null; do \
		seconds=$$(($$(date +%s) - start)); \
		printf '   %d:%02d, %s of $(SIZE) GB unpacked\n' $$((seconds / 60)) $$((seconds % 60)) $$(du -sh $(VENV) | cut -f1); \
	done & \
	$(INSTALL)
	@touch $@

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

# NVIDIA's runtime next to ours: PERSONAPLEX is a clone of github.com/NVIDIA/personaplex. Two minutes.
test-runtime: $(INSTALLED)
	PERSONAPLEX="$(abspath $(PERSONAPLEX))" $(BIN)/python -m pytest tests/runtime

# What is otherwise computed, on a GPU: benchmarks/gpu. Ten minutes at most. On a machine that has its own torch and no
# network, WHEELS is a folder with what images with torch lack; `make gpu-wheels` fills it where there is a network, for
# the GPU machine's version of Python. What else is missing there (numpy, scipy, matplotlib, tqdm, requests, pyyaml,
# einops, sentencepiece, safetensors) can be added to it.
gpu-check: $(if $(WHEELS),,$(INSTALLED))
ifdef WHEELS
	rm -rf .gpu-packages
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target .gpu-packages '$(WHEELS)'/*.whl
	PYTHONPATH="$(CURDIR)/.gpu-packages:$$PYTHONPATH" $(PYTHON) -m benchmarks.gpu $(GPU_CHECK)
else
	$(BIN)/python -m benchmarks.gpu $(GPU_CHECK)
endif

GPU_PYTHON := 3.12
DOWNLOAD = $(PYTHON) -m pip download --quiet --only-binary :all: --python-version $(GPU_PYTHON) --dest '$(WHEELS)'
gpu-wheels:
	$(DOWNLOAD) --no-deps 'moshi>=0.2.13,<0.3' 'sphn<0.3' 'huggingface_hub<1' fire termcolor submitit cloudpickle \
		pyloudnorm
	$(DOWNLOAD) pydantic

lint: $(INSTALLED)
	$(BIN)/ruff check .

# Run it alone on an idle machine: it uses all cores.
bench: export OMP_NUM_THREADS = $(shell nproc)
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv .venv-newest .gpu-packages build *.egg-info runs/demo runs/tutorial
