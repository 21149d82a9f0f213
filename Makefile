# make demo   set up .venv, expand, train and collapse real networks; prints where the report is
# make test   set up .venv and run linters, type checks, import contracts and tests
# make slow   run the tests that make test leaves out, since they take more than a few seconds each
# make gpu    run the tests that need a CUDA device, and write what training costs on it to docs/gpu.md;
#             BLOCKS=acb,dbb for some blocks
# make clean  remove .venv and everything built
#
# PYTHON=python3.12 make demo   uses another interpreter (3.10 or newer)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test slow gpu clean
.NOTPARALLEL:

demo: $(VENV)/zoo.installed
	$(BIN)/reparam demo

test: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy reparam passes
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m 'not slow'

slow: $(VENV)/test.installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

gpu: $(VENV)/test.installed
	$(BIN)/python -m pytest -m gpu
	$(BIN)/reparam bench step --device cuda --network torchvision:resnet50 --batch 128 --size 224 --bf16 --compiled --blocks '$(BLOCKS)' --out docs/gpu.md

# The stamp is newer than pyproject.toml when that extra is installed as declared: a second run installs nothing.
# pip is asked for rather than python: an interrupted or failed venv leaves a python without pip.
# The test extra contains the zoo extra, so both stamps are set.
$(VENV)/%.installed: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@ $(VENV)/zoo.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find passes reparam zoo tests -name __pycache__ -type d -prune -exec rm -rf {} +
