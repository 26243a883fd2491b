# Entry points for people and for CI. What they do is in scripts/.
.DEFAULT_GOAL := help
.PHONY: help build test demo fmt lint doc fuzz-short bench compare clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the program: target/release/rbd2qcow2
	scripts/install-deps build
	cargo build --release

test: ## Install what is missing and run every check, as CI does
	scripts/install-deps build test
	scripts/ci-checks

demo: ## Back up and prove a disposable Ceph image, from nothing
	scripts/demo

fmt: ## Format the sources
	cargo fmt --all

lint: ## Check formatting, scripts and clippy
	scripts/ci-checks scripts fmt clippy clippy-without-rbd

doc: ## Build the libraries' documentation
	scripts/ci-checks doc

fuzz-short: ## Run each fuzz target for FUZZ_SECONDS (20)
	scripts/ci-checks fuzz

bench: ## Run the benchmarks, which need no Ceph
	scripts/install-deps build test
	cargo bench -p rbd2qcow2-benches

compare: ## Measure side by side with other tools, on a disposable cluster (1 h)
	scripts/compare

clean: ## Remove everything that was built
	cargo clean
	rm -rf fuzz/target fuzz/corpus fuzz/artifacts fuzz/coverage
