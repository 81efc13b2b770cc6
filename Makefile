# Kornak's targets. Each is one screen of shell at most; what CI runs is .ci/run.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export PATH := $(PATH):$(if $(CARGO_HOME),$(CARGO_HOME),$(HOME)/.cargo)/bin
CARGO ?= cargo
TARGET_DIR := $(if $(CARGO_TARGET_DIR),$(CARGO_TARGET_DIR),target)

.PHONY: help install demo test lint drivers clients pgbench bench gaps sessions torture matrix

help:           ## Show this list
	@sed -nE 's/^([a-z]+): *[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install:        ## Install what the machine lacks to build and run Kornak
	scripts/install.sh

demo: install   ## Build, then run a cluster of three nodes here until Ctrl-C (ARGS="--nodes 5")
	$(CARGO) build --locked --release -p kornak-ctl
	@exec $(TARGET_DIR)/release/kornak demo $(ARGS)

# One build of everything with one set of features, so that the runner below compiles nothing again.
test:           ## Run every test: cores, simulation, real PostgreSQL and etcd
	scripts/install.sh --tests
	$(CARGO) build --locked --workspace --all-targets
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
	  set -ex; \
	  $(CARGO) test --locked --workspace --doc --quiet; \
	  $(CARGO) nextest run --locked --workspace; \
	else \
	  set -ex; \
	  $(CARGO) test --locked --workspace --no-fail-fast; \
	fi

lint:           ## Check format, clippy and documentation, warnings denied
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items --quiet

drivers:        ## Run drivers' own test suites directly and through the proxy
	scripts/install.sh --tests --drivers
	$(CARGO) build --locked --workspace --bin kornak
	KORNAK_BIN=$(TARGET_DIR)/debug/kornak tests/drivers/run.sh $(ARGS)

matrix:         ## Run real-process tests with PostgreSQL 13 to 18 (ARGS="17 18" ONLY="slots libpq")
	scripts/install.sh --tests
	$(CARGO) build --locked --workspace --bin kornak
	tests/matrix/run.sh $(ARGS)

clients:        ## Run client stacks of many languages through switchovers and a crash (ARGS="java psqlodbc")
	scripts/install.sh --tests --clients
	tests/clients/setup.sh $(TARGET_DIR)/clients
	$(CARGO) build --locked -p kornak-ctl -p kornak-tests --bins
	$(TARGET_DIR)/debug/kornak-clients --built $(TARGET_DIR)/clients $(ARGS)

pgbench:        ## Run pgbench -M prepared, 200 clients over a pool of 8, each answer checked (MINUTES=10)
	scripts/install.sh --tests
	mkdir -p $(TARGET_DIR)/clients
	$(CARGO) build --locked -p kornak-ctl -p kornak-tests --bins
	$(TARGET_DIR)/debug/kornak-clients --built $(TARGET_DIR)/clients --crowd $(if $(MINUTES),$(MINUTES),10) $(ARGS)

bench:          ## Compare pgbench direct, through HAProxy, PgBouncer and Kornak
	scripts/install.sh --tests
	$(CARGO) build --locked --release -p kornak-ctl -p kornak-benches
	$(TARGET_DIR)/release/kornak-compare $(ARGS)

gaps:           ## Compare what clients see of switchovers and failures with Patroni and HAProxy (ARGS="--rounds 5")
	scripts/install.sh --tests
	$(CARGO) build --locked --release -p kornak-ctl
	$(CARGO) build --locked -p kornak-tests --bin kornak-gaps
	KORNAK_BIN=$(TARGET_DIR)/release/kornak $(TARGET_DIR)/debug/kornak-gaps $(ARGS)

sessions:       ## Measure a switchover and a crash with many sessions (ARGS="--series 100:500,600:2000")
	scripts/install.sh --tests
	$(CARGO) build --locked --release -p kornak-ctl
	$(CARGO) build --locked -p kornak-tests --bin kornak-sessions
	KORNAK_BIN=$(TARGET_DIR)/release/kornak $(TARGET_DIR)/debug/kornak-sessions $(ARGS)

torture:        ## Break a cluster every few seconds and check what clients saw (MINUTES=30 MODES="on strict quorum off")
	scripts/install.sh --tests
	$(CARGO) build --locked -p kornak-ctl -p kornak-tests --bins
	set -e; for mode in $(if $(MODES),$(MODES),on strict quorum off); do \
	  $(TARGET_DIR)/debug/kornak-torture --mode $$mode --minutes $(if $(MINUTES),$(MINUTES),30) $(ARGS); \
	done
