PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DATA ?= $(or $(DENSEPRED_DATA),../shared/data)

.PHONY: setup demo test lint acceptance docs clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade -c constraints.txt -e '.[dev]'
	touch $@

# Makes volumes, trains on them, segments new ones, scores them and draws the result.
demo: setup
	rm -rf $(DEMO)
	$(BIN)/python data/synthetic_volumes.py $(DEMO)/data --cases 24 --seed 0
	$(BIN)/python data/synthetic_volumes.py $(DEMO)/new --cases 6 --seed 1
	$(BIN)/densepred check configs/demo_unet3d.yaml data.root=$(DEMO)/data
	$(BIN)/densepred train configs/demo_unet3d.yaml data.root=$(DEMO)/data --run $(DEMO)/run
	$(BIN)/densepred predict $(DEMO)/run $(DEMO)/new/imagesTr --out $(DEMO)/predictions
	$(BIN)/densepred evaluate $(DEMO)/predictions $(DEMO)/new/labelsTr --out $(DEMO)/scores --images $(DEMO)/new/imagesTr
	@echo
	@echo "Curves:      $(DEMO)/run/curves.png"
	@echo "Predictions: $(DEMO)/predictions"
	@echo "Pictures:    $(DEMO)/scores"

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The long checks (four hours): accuracy, memory against depth and size, speed, killed runs, and the GPU where there is one.
acceptance: setup
	rm -rf runs/acceptance/new_user runs/acceptance/hippocampus runs/acceptance/cosmic_rays
	$(BIN)/python scripts/new_user.py --data "$(DATA)/hippocampus" --out runs/acceptance/new_user
	$(BIN)/python scripts/hippocampus.py --data "$(DATA)/hippocampus" --least 0.87 --out runs/acceptance/hippocampus
	$(BIN)/python scripts/cosmic_rays.py --out runs/acceptance/cosmic_rays
	$(BIN)/python scripts/bench_memory.py --repeats 3
	$(BIN)/python scripts/bench_large.py
	$(BIN)/python scripts/bench_budget.py
	$(BIN)/python scripts/bench_inference.py --repeats 3
	$(BIN)/python scripts/bench_files.py
	$(BIN)/python scripts/bench_resample.py
	$(BIN)/python scripts/crash_loop.py --kills 10
	$(BIN)/python scripts/gpu.py
	$(BIN)/python scripts/mass_maps.py --out runs/acceptance/massmap --workers 2 training.budget=8min training.validate_every=20
	$(BIN)/python scripts/nuclei.py --data "$(DATA)/nuclei" --out runs/acceptance/nuclei training.validate_every=20

docs: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info site
