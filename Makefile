# The two commands: `make train` and `make test`. Both make .venv first; nothing else is to be set up.

RUN := .venv/bin/python
# Test processes, for two cores; 0: none beside this one.
WORKERS := 2

.PHONY: train test nightly bench check env dev clean
train: env
	@echo '+ $(RUN) launch.py $(ARGS)'
	@$(RUN) launch.py $(ARGS)

# What CI runs.
test: dev check
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What is slow and proves again what a faster test proves.
nightly: dev
	$(RUN) -m pytest -m nightly

# Style, types and the order of the packages.
check: dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright
	.venv/bin/lint-imports

bench: env
	$(RUN) -m benchmarks.adapter_update

env:
	@tools/install.sh

dev:
	@tools/install.sh dev

clean:
	rm -rf .venv build dist *.egg-info
