# The commands that the README promises. PYTHON=python3.12 make ... picks the interpreter for .venv.
.PHONY: quickstart quickstart-tiny test test-all test-fast lint

# a file in one process, in the order of tests/conftest.py
pytest = OMP_NUM_THREADS=1 .venv/bin/python -m pytest --dist loadfile --no-loadscope-reorder

quickstart:
	scripts/quickstart.sh

quickstart-tiny:
	scripts/quickstart.sh --tiny

test: .venv-test
	$(pytest) -m "not thorough" -n 3

test-all: .venv-test
	$(pytest) -n 3

test-fast: .venv-test
	$(pytest) -m "not slow" -n 2

lint:
	scripts/setup_venv.sh dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.PHONY: .venv-test
.venv-test:
	scripts/setup_browser.sh & scripts/setup_venv.sh test; code=$$?; wait $$!; exit $$code
