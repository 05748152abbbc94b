# The commands of a newcomer. Everything runs from the repository's root, in .venv.
PYTHON ?=
DOCKERFILE ?= Dockerfile
TAG ?= ffcv-imnet
python := .venv/bin/python

# torch's threads wait for each other by spinning, for milliseconds, before they sleep. Beside any
# other busy process a run on two cores then crawls; sleeping at once costs little.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint image clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 12

setup:  ## install what is missing: system packages where it may, .venv, pinned Python packages
	@PYTHON='$(PYTHON)' bash setup.sh

demo: setup  ## the whole path on a generated data set: write, train, log, table, curve
	@$(python) -m ffcv_imnet demo

# One thread a process: two workers on two cores are faster than two threads that wait for each other.
test: setup  ## the tests, on up to four cores
	@OMP_NUM_THREADS=1 $(python) -m pytest -n auto --maxprocesses 4 --dist loadscope

lint: setup  ## style and types
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(python) -m mypy

image:  ## a Docker image: DOCKERFILE=Dockerfile (GPUs) or Dockerfile.cpu, TAG=ffcv-imnet
	docker build -f '$(DOCKERFILE)' -t '$(TAG)' .

clean:  ## remove caches and the demo's files (not .venv, not your data, not your runs)
	rm -rf data/demo .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.venv -prune -o -path ./data -prune -o -name __pycache__ -type d -print0 | xargs -0 -r rm -rf
