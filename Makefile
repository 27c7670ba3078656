# Each target works on a bare machine with Python 3.11 or newer: it makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: install run test check claims bench docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[all]"
	touch $@

run: install
	$(BIN)/palimpsest run --out out/world

test: install
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS)

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

claims: install
	$(ONE_THREAD) $(BIN)/palimpsest reproduce --all --workers $(WORKERS)

bench: install
	for script in benchmarks/*.py; do case $$script in */common.py) ;; *) echo "== $$script"; $(BIN)/python $$script || exit 1;; esac; done

docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site out dist
