# Estran: the daily commands. CONTRIBUTING.md explains them.
GO       ?= go
PKGS     ?= ./...
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMIT   ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo none)
DATE     ?= $(shell git show -s --format=%cI HEAD 2>/dev/null || echo none)
LDFLAGS  := -s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT) -X main.date=$(DATE)
TOOL     := $(GO) tool -modfile=tools/go.mod
FUZZTIME ?= 20s
BENCHTIME?= 1s
SEED     ?= 1
ROUNDS   ?= 20
NEMESES  ?=
MISTAKES ?= all
HOURS    ?=
SOAK_FLAGS ?=
SOAK_MINUTES ?= $(shell echo $$(($(or $(HOURS),2) * 60)))

.PHONY: build test short lint cross race fuzz bench bench-go bench-compare bench-wal golden localstack-bin compose-test clients-test image faults planted sim soak clean

build: ## one static binary, ./estran
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o estran ./cmd/estran

test: lint cross race ## all that must pass: what the README and the CI run

short: ## seconds, while editing
	$(GO) test -short $(PKGS)

lint: ## gofmt, vet, staticcheck, tidy go.mod
	@out=$$(gofmt -l $$(git ls-files '*.go')); test -z "$$out" || { echo "gofmt would change:"; echo "$$out"; exit 1; }
	$(GO) vet ./...
	$(TOOL) staticcheck ./...
	$(GO) mod tidy -diff

cross: ## the binary builds for every platform we name
	@for t in linux/amd64 linux/arm64 darwin/amd64 darwin/arm64; do \
	  echo "cross $$t"; CGO_ENABLED=0 GOOS=$${t%/*} GOARCH=$${t#*/} $(GO) build -o /dev/null ./cmd/estran || exit 1; done

race: ## every test with the race detector, in a random order
	GORACE=halt_on_error=1 $(GO) test -race -shuffle=on -timeout 60m $(PKGS)

# Coverage is counted in what is fuzzed and in the decoders behind it, not in everything that is linked, as with go test -fuzz: reading 170,000 counters after each execution takes
# longer than most executions.
FUZZ_COVER = ./tiering/record encoding/json github.com/goccy/go-yaml/... github.com/klauspost/compress/...

fuzz: ## every fuzz target for FUZZTIME, which may be a number of executions: 10000000x
	@set -e; bin=$$(mktemp); trap 'rm -f '$$bin EXIT; \
	for d in $$(git grep -l '^func Fuzz' -- '*_test.go' | xargs -n1 dirname | sort -u); do \
	  $(GO) test -c -o $$bin $(foreach x,$(FUZZ_COVER) ./$$d/...,-gcflags=$(x)=-d=libfuzzer=1) ./$$d; \
	  for f in $$(grep -ho '^func Fuzz[A-Za-z]*' $$d/*_test.go | cut -c6-); do echo "fuzz $$d $$f"; \
	    (cd $$d && $$bin -test.run '^$$' -test.fuzz "^$$f\$$" -test.fuzztime $(FUZZTIME) -test.fuzzminimizetime 100x \
	      -test.fuzzcachedir $$($(GO) env GOCACHE)/fuzz/$$($(GO) list .)); done; done

bench: bench-go bench-compare ## Go benchmarks, then Estran beside Apache Kafka

bench-go:
	$(GO) test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) $(PKGS)

bench-compare: build ## Estran beside Apache Kafka (needs Java 17 and Maven), into docs/BENCHMARKS.md; BENCH are its flags, BENCH=--help explains them
	$(GO) run ./bench $(BENCH)

bench-wal: ## StoreLogs beside hashicorp/raft-wal, a module of its own; TMPDIR says which disk
	cd bench/wal && $(GO) test -run '^$$' -bench . -benchtime $(BENCHTIME) .

golden: ## rewrite golden files; read the diff, commit what you understand
	UPDATE_GOLDEN=1 $(GO) test ./tiering/... ./raftmeta/... ./broker/... ./cmd/...
	git diff --stat

localstack-bin: ## static object stores into localstack/bin, for docker-compose.build.yml
	bash localstack/build-bin

image: build ## estran:local, FROM scratch
	docker build -q -f deploy/Dockerfile.local -t estran:local .

compose-test: build localstack-bin ## docker compose with locally built images: up, produce, consume, restart, down
	bash deploy/compose-test

clients-test: build ## kcat, kafka-python, confluent-kafka, Java, franz-go and sarama against one voter and against three; skips what is not installed
	bash localstack/clients/run
	bash localstack/clients/quorum

faults: ## ROUNDS of faults, chosen by SEED, under a load whose history is checked; NEMESES chooses kinds
	$(GO) run ./localstack/faults --seed $(SEED) --rounds $(ROUNDS) --nemeses "$(NEMESES)"

planted: ## rounds of faults against programs with one known MISTAKE each, until it is caught; SEED is the first of three
	$(GO) run ./localstack/faults --seed $(SEED) --nemeses "$(NEMESES)" --planted "$(MISTAKES)"

sim: ## HOURS of cluster time in minutes: three voters in one process under faults and a load chosen by SEED; the time is virtual
	ESTRAN_SIM_SEED=$(SEED) ESTRAN_SIM_HOURS=$(or $(HOURS),24) $(GO) test ./raftmeta/sim -count=1 -v -timeout 60m

soak: ## HOURS of three voters (or SOAK_MINUTES) under a load in which everything comes and goes: what grows? ends by itself; SOAK_FLAGS="--load full" (or idle)
	$(GO) run ./localstack/soak --minutes $(SOAK_MINUTES) $(SOAK_FLAGS)

clean:
	rm -f estran
