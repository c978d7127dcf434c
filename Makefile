# The commands that the README promises. PYTHON=python3.12 make ... picks the interpreter for .venv.
.PHONY: quickstart quickstart-tiny test test-all test-fast lint

quickstart:
	scripts/quickstart.sh

quickstart-tiny:
	scripts/quickstart.sh --tiny

test: .venv-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not thorough" -n 3 --dist loadfile --no-loadscope-reorder

test-all: .venv-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-fast: .venv-test
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

lint:
	scripts/setup_venv.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.PHONY: .venv-test
.venv-test:
	scripts/setup_browser.sh & scripts/setup_venv.sh test; code=$$?; wait $$!; exit $$code
