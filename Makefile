PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   ?= demo
READY  := $(VENV)/.ready

.PHONY: demo test test_gpu test_peers test_browser test_style fuzz quality style clean

# The virtual environment, made once and again when the requirements change.
$(READY): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  f"Python {v[0]}.{v[1]} is not supported: run make with PYTHON=python3.11 (or 3.12, 3.13).")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quality]'
	@touch $@

# A whole run on the miniature SDXL: pictures, training, base and tuned side by side.
demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash scripts/demo.sh $(DEMO)

# One thread, and no GPU: these tests compare bit for bit. A process for each core, and a file's tests in one; the files
# in the order given, the long ones first, so that no core waits for the last.
test: $(READY)
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
	  tests/notebook tests/integration tests/unit

test_gpu: $(READY)
	$(BIN)/python -m pytest tests/gpu

# Compares with checkouts of the peers: make test_peers DIFFUSERS=path/to/diffusers SD_SCRIPTS=path/to/sd-scripts
test_peers: $(READY)
	DIFFUSERS="$(DIFFUSERS)" SD_SCRIPTS="$(SD_SCRIPTS)" $(BIN)/python -m pytest -rs tests/peers

# The page in a Chromium of the system. Gradio takes an older Pillow than the one that constraints.txt pins.
test_browser:
	$(PYTHON) -m venv $(VENV)-browser
	$(VENV)-browser/bin/python -m pip install --quiet --editable '.[test,app,browser]'
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= $(VENV)-browser/bin/python -m pytest -rs tests/browser

# Does the miniature learn the style, and is each broken link of the chain seen? A quarter of an hour on two cores.
test_style: $(READY)
	$(BIN)/python -m pytest -rs tests/style

# Half of the time with hypothesis, half with atheris.
MINUTES ?= 10
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	for engine in hypothesis atheris; do \
	  $(BIN)/python tests/fuzz/fuzz.py --engine $$engine --minutes $$(($(MINUTES) / 2)) || exit 1; done

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-browser demo
