# The two commands of the README are `make demo` and `make test`; each sets up all it needs.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
DEMO_STAMP := $(VENV)/.set-up-demo

.PHONY: bench-fairness bench-neighbour bench-connect bench-output demo test check bench docs site soak e2e mutants lint unit compiled fuzz clean help

help:
	@sed -n 's/^#: //p' Makefile

#: make demo    run a service of its own, show some jobs and their limits, clean up
demo: $(DEMO_STAMP)
	@$(BIN)/worker demo

#: make test    everything: lint, types, import rules, all tests (several at a time, but for some)
WITH_SERVICES := tests/e2e tests/integration tests/security# the longest first
ALL_BUT_ALONE := -m "not alone" -n 3 --dist loadfile --no-loadscope-reorder
# The tests share the host's processors, disks and locks. One that has failed runs once more, with
# nothing beside it, and has failed if it fails again. What passes then is listed above: mend it.
AGAIN := --last-failed --last-failed-no-failures=none -n 0
test: compiled
	@$(MAKE) --no-print-directory check AT_ONCE=1 > $(VENV)/check.log 2>&1 & check=$$!; failed=0; \
	services() { $(BIN)/python -m pytest -o cache_dir=$(VENV)/.failed $(WITH_SERVICES) "$$@"; }; \
	services -m alone; alone=$$?; \
	wait $$check || failed=1; echo "make check beside them:"; cat $(VENV)/check.log; \
	[ $$alone = 0 ] || services -m alone $(AGAIN) || failed=1; \
	services $(ALL_BUT_ALONE) 2> $(VENV)/workers.log || services -m "not alone" $(AGAIN) || failed=1; \
	cat $(VENV)/workers.log >&2; exit $$failed

#: make check   in a minute: lint, types, import rules, unit tests
AT_ONCE := 2
check: compiled
	@$(MAKE) --no-print-directory -j $(AT_ONCE) --output-sync=target lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

unit: compiled
	$(BIN)/python -m pytest tests/unit -q -n $(AT_ONCE)

# Services that tests start find the package compiled; the launcher writes no files by itself.
unexport PYTHONDONTWRITEBYTECODE
compiled: $(STAMP)
	@$(BIN)/python -m compileall -q src

#: make bench   time the start of jobs beside bwrap and crun
bench: $(STAMP)
	@contrib/set-up.sh bench
	$(BIN)/python -m bench.start_latency

#: make soak    long runs of what the tests do shortly; half an hour
soak: $(STAMP)
	JOBWORKER_SOAK=1 $(BIN)/python -m pytest tests/unit tests/security tests/e2e \
		tests/integration/test_vanishing.py tests/integration/test_full_disk_steps.py \
		tests/integration/test_lost_state.py tests/integration/test_lifecycle.py -q --timeout=3600

#: make mutants take one defence away at a time and see a test go red; ten minutes
mutants: $(STAMP)
	$(BIN)/python -m tests.security.mutants

#: make e2e     scenarios on a throw-away machine with systemd, see contrib/e2e.sh: E2E_RUN=COMMAND
E2E_RUN ?=
e2e: $(STAMP)
	contrib/e2e.sh $(VENV) "$(E2E_RUN)" $(SCENARIO)

#: make docs    write the generated parts of docs/protocol.md and docs/architecture.md
docs: $(STAMP)
	$(BIN)/python contrib/protocol_page.py
	$(BIN)/python contrib/rooms.py

#: make site    the documents and the Python API as web pages: .site/docs/index.html
site: $(STAMP)
	@$(BIN)/python -c 'import sphinx, furo, myst_parser' 2>/dev/null || $(BIN)/pip install -q -e '.[docs]'
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . .site

#: make fuzz    every fuzz target for FUZZ_SECONDS (60) each, guided by coverage
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -q -e '.[fuzz]'
	@for file in fuzz/fuzz_*.py; do \
		name=$${file#fuzz/fuzz_}; name=$${name%.py}; \
		mkdir -p .fuzz/$$name; \
		echo "$$name, $(FUZZ_SECONDS) s"; \
		$(BIN)/python $$file -max_total_time=$(FUZZ_SECONDS) -verbosity=0 -print_final_stats=1 \
			-artifact_prefix=.fuzz/$$name- .fuzz/$$name fuzz/seeds/$$name || exit 1; \
	done

#: make bench-output   time output beside raw TLS and gRPC (about five minutes)
bench-output: $(STAMP)
	@$(BIN)/python -c 'import grpc' 2>/dev/null || $(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python -m bench.output

#: make bench-connect   time connections and requests beside gRPC
bench-connect: $(STAMP)
	@$(BIN)/python -c 'import grpc' 2>/dev/null || $(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python -m bench.connect

#: make bench-neighbour   what hostile jobs do to disks, sockets, terminals and a neighbour's starts
bench-neighbour: $(STAMP)
	$(BIN)/python -m bench.neighbour

#: make bench-fairness   what a flood of each kind does to a quiet client and to the service's memory
bench-fairness: $(STAMP)
	$(BIN)/python -m bench.fairness

#: make clean   remove what the others made
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .fuzz .site

$(STAMP): pyproject.toml contrib/set-up.sh
	@contrib/set-up.sh tests $(VENV)
	@touch $(STAMP) $(DEMO_STAMP)

$(DEMO_STAMP): pyproject.toml contrib/set-up.sh
	@contrib/set-up.sh demo $(VENV)
	@touch $(DEMO_STAMP)
