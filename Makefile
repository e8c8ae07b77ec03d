# What a newcomer types. Each target sets up what it needs and is quick the second time.

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-compare demo-handoff test unit lint bench soak fuzz docs clean
bin := .venv/bin

help:           ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup:          ## install packages and a virtual environment
	@tools/setup run

demo:           ## the main job: an app's warm VM answers from a small overlay
	@tools/setup run
	@$(bin)/python tools/demo.py

demo-compare:   ## the demo beside booting and downloading the full image
	@tools/setup run bench
	@$(bin)/python tools/demo.py --compare

demo-handoff:   ## a running VM follows its user to another cloudlet, beside QEMU's own migration
	@tools/setup run
	@$(bin)/python tools/demo_handoff.py

test: lint      ## lint, types, layers, and all tests, real QEMU included; files of tests side by side
	@tools/setup test
	@$(bin)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

unit:           ## the tests that start no QEMU
	@tools/setup test
	@$(bin)/pytest -m "not qemu and not slow"

lint:           ## style, types, layers
	@tools/setup test
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports

bench:          ## measure every number that SPECIFICATION.md promises (about 90 minutes, not timed yet)
	@tools/setup bench
	@$(bin)/python -m benchmarks

soak:           ## the faults of the tests in large numbers, with a printed seed (60 minutes a part)
	@tools/setup test
	@$(bin)/python -m tests.soak

fuzz:           ## ten million damaged overlays against the reader
	@tools/setup fuzz
	@$(bin)/python tests/fuzz/fuzz_overlay.py --runs 10000000

docs:           ## the documentation as HTML, in docs/_build/html
	@tools/setup docs
	@$(bin)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

clean:          ## remove what the targets made in this checkout
	rm -rf .venv .setup build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
