# make demo: set up what asking needs (no torch), then ask the shipped model, offline
# make test: set up, then run the tests
# make test-ollama: build a real Ollama in the user's cache (ten minutes the first time), test on it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CORE := $(VENV)/.core

.PHONY: demo test test-ollama lint types docs clean

demo: $(CORE)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	-tests/llama_cpp_tree.sh $(BIN)/python build/llama.cpp
	$(BIN)/pytest -n 2 --dist loadfile

test-ollama: $(STAMP)
	tests/ollama/install.sh $(BIN)/python build/ollama
	$(BIN)/pytest -m ollama

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/structure.py

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# llama-cpp-python is compiled here once (some minutes); pip keeps the wheel for the next time. Where
# the processor has AMX it is left out: llama.cpp crashes with it (repacks in qcat/backends/llama.py).
# A wheel that pip has from before is replaced then.
NO_AMX := $(shell grep -qs amx_int8 /proc/cpuinfo && echo -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
$(CORE): export CMAKE_ARGS ?= $(if $(NO_AMX),-DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)')
$(CORE): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e .
	$(BIN)/python -c "from qcat.backends.llama import repacks as r; exit(not r())" || { \
	  $(BIN)/python -m pip cache remove llama_cpp_python; \
	  $(BIN)/python -m pip install --force-reinstall --no-deps llama-cpp-python; }
	touch $(CORE)

$(STAMP): $(CORE)
	$(BIN)/python -m pip install -e '.[all,dev]'
	touch $(STAMP)
