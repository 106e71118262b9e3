# Every command of the project; `make help` lists them. Each target sets up what it needs.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PORT ?= 5000
# The cluster that the targets from cluster-up to cluster-down are about: a name in cluster/configs, or a YAML file
CLUSTER ?= local2
DEMO := pipelines/configs/demo.yaml
# The workflow that run, status, plan, verify, retry and gc are about, and overrides: make plan W=my.yaml SET="root=runs/my"
W ?= $(DEMO)
SET ?=

# Processes of `make test`, one more than there are cores to fill, since many a test waits: for a Ray to start, a lease
# to lapse, a process to end. tests/conftest.py says which files go first, so that none ends alone with a long one.
TEST_PROCESSES ?= 3

# One thread a process: the stages run as many processes as there are cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Nothing here phones home: usage statistics, telemetry and update checks are off.
export RAY_USAGE_STATS_ENABLED ?= 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1
export NO_ALBUMENTATIONS_UPDATE ?= 1
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= disabled

.DEFAULT_GOAL := help
.PHONY: help setup demo doctor browse demo-edit run status plan verify retry gc evaluate compare export lineage flops ladder ladder-table unifusion related gpu-science bench-gpu cluster-up cluster-status submit jobs logs cancel cluster-down test test-slow test-gpu test-cluster fuzz lint format foundation base unifusion-base mlflow clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is newer than the lock when the environment holds exactly the lock, so a second call costs nothing.
# torch goes first and alone: once it is there, no other package asks for a build of its own choice.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version}; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $$(grep '^torch==' requirements.lock) $$(grep '^setuptools==' requirements.lock)
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	@touch $@

setup: $(STAMP) ## create .venv with the locked versions (the other targets do this themselves)

demo: $(STAMP) ## the whole pipeline on the embedded world: data -> training -> images, 7 to 19 minutes on 2 cores
	@$(BIN)/python -m pipelines run $(DEMO)

# Some of the base's scenes are mixed into the edits. BASE=folder of another UniFusion checkpoint to go on from.
demo-edit: $(STAMP) ## UniFusion learns to edit: scenes, edits, rewritings in sight of the images -> fine-tune of the shipped base -> scores
	@$(BIN)/python -m pipelines run pipelines/configs/unifusion_base.yaml root=runs/demo_edit_scenes source.num_samples=4000 last_stage=rewrites
	@$(BIN)/python -m pipelines run pipelines/configs/demo_edit.yaml $(if $(BASE),trainings.edit.init_from=$(BASE))

run: $(STAMP) ## bring a workflow up to date: make run W=workflow.yaml SET="key.path=value ..."; so do the next five
	@$(BIN)/python -m pipelines run $(W) $(SET)

status: $(STAMP) ## what each stage holds: fresh, partial, stale or missing, and why
	@$(BIN)/python -m pipelines status $(W) $(SET)

plan: $(STAMP) ## shards, samples, bytes and device time of the data stages, before anything runs
	@$(BIN)/python -m pipelines plan $(W) $(SET)

verify: $(STAMP) ## read every byte again; quarantine what is broken and make only that anew
	@$(BIN)/python -m pipelines verify $(W) $(SET)

retry: $(STAMP) ## download again the samples that failed for a reason that may have passed
	@$(BIN)/python -m pipelines retry $(W) $(SET)

gc: $(STAMP) ## list what no workflow refers to; make gc SET=--delete removes it
	@$(BIN)/python -m pipelines gc $(W) $(SET)

doctor: $(STAMP) ## can this machine do it: cores, memory, GPUs, versions, disk, ports, tokens: make doctor W=my.yaml
	@$(BIN)/python -m pipelines.doctor $(if $(filter command,$(origin W)),$(W))

browse: $(STAMP) ## pictures, captions and drops of the data stages in a browser: make browse W=my.yaml (BROWSE_PORT=8090)
	@$(BIN)/python -m pipelines.browse $(W) $(SET) --port $(or $(BROWSE_PORT),8090)

compare: $(STAMP) ## evaluations side by side on one page: make compare RUNS="runs/a runs/b" (OUT=compare.html)
	@$(BIN)/python -m pipelines.reporting.compare $(RUNS) --out $(or $(OUT),compare.html)

evaluate: $(STAMP) ## score checkpoints now: make evaluate RUN=runs/demo STEP=600 (or latest, best, all)
	@$(BIN)/python -m pipelines evaluate $(or $(RUN),$(W)) --step $(or $(STEP),latest) $(SET)

export: $(STAMP) ## a folder to generate from anywhere: make export CHECKPOINT=runs/demo/train/checkpoints/step_00001500 OUT=my_model
	@$(BIN)/python -m repfusion.export --checkpoint $(CHECKPOINT) --out $(OUT)

lineage: $(STAMP) ## what an image, checkpoint or export was made from: make lineage OF=image.png
	@$(BIN)/python -m repfusion.lineage $(OF)

flops: $(STAMP) ## FLOPs, parameters and memory: make flops CONFIG=repfusion/configs/repfusion_7b_1.3b.yaml SET="--num-steps 50"
	@$(BIN)/python -m repfusion.flops $(if $(CONFIG),--config $(CONFIG)) $(SET)

# What has a result is not run again; SET='rows=[repfusion,static_queries] seeds=[0]' does a part now.
ladder: $(STAMP) ## compare the conditioning methods, rows x seeds, then write docs/ladder.md: make ladder SET="seeds=[0]"
	@$(BIN)/python -m pipelines.ladder run $(or $(LADDER),pipelines/ladder/configs/ladder.yaml) $(SET)
	@$(BIN)/python -m pipelines.ladder compute $(or $(LADDER),pipelines/ladder/configs/ladder.yaml) $(SET)
	@$(BIN)/python -m pipelines.ladder table $(or $(LADDER),pipelines/ladder/configs/ladder.yaml)

ladder-table: $(STAMP) ## docs/ladder.md again, from the result files alone
	@$(BIN)/python -m pipelines.ladder table $(or $(LADDER),pipelines/ladder/configs/ladder.yaml)

unifusion: $(STAMP) ## compare UniFusion's fusions and VERIFI (docs/unifusion/plan.md), going on where it stood, then write docs/unifusion.md: make unifusion SET="seeds=[0]"
	@$(BIN)/python -m pipelines.ladder run pipelines/ladder/configs/unifusion.yaml $(SET)
	@$(BIN)/python -m pipelines.ladder table pipelines/ladder/configs/unifusion.yaml

related: $(STAMP) ## compare the related systems (docs/related/plan.md), going on where it stood, then write docs/related.md: make related SET="seeds=[0]"
	@$(BIN)/python -m pipelines.ladder run pipelines/ladder/configs/related.yaml $(SET)
	@$(BIN)/python -m pipelines.ladder table pipelines/ladder/configs/related.yaml

# Foundation, rows seed by seed, table: what is done is kept, so call it until it says that all rows are done.
gpu-science: $(STAMP) ## docs/ladder/plan.md on one GPU, 9 minutes a call, each going on: make gpu-science SET="--rows repfusion,static_queries --seeds 0"
	@$(BIN)/python -m pipelines.ladder.science $(SET)

# Without a GPU a rehearsal at a small size. A machine without this environment: PYTHONPATH=. python benchmarks/gpu.py
bench-gpu: $(STAMP) ## measure encoding, training and sampling on one GPU, 9 minutes a call, each going on: make bench-gpu SET="--parts encoding sample_8"
	@PYTHONPATH=. $(BIN)/python benchmarks/gpu.py $(SET)

cluster-up: $(STAMP) ## start a cluster, cluster/configs/NAME.yaml: make cluster-up CLUSTER=local2; cluster/README.md has the kinds
	@$(BIN)/python -m cluster up --cluster $(CLUSTER)

cluster-status: $(STAMP) ## what of a cluster runs, and its jobs at work
	@$(BIN)/python -m cluster status --cluster $(CLUSTER)

submit: $(STAMP) ## run a workflow as a job of a cluster: make submit W=my.yaml CLUSTER=local2 SET="key.path=value ..." FOLLOW=1
	@$(BIN)/python -m cluster submit $(W) $(SET) --cluster $(CLUSTER) $(if $(FOLLOW),--follow)

jobs: $(STAMP) ## a cluster's jobs: name, state, start, commit, workflow
	@$(BIN)/python -m cluster jobs --cluster $(CLUSTER)

logs: $(STAMP) ## what a job says: make logs JOB=name CLUSTER=local2 FOLLOW=1
	@$(BIN)/python -m cluster logs $(JOB) --cluster $(CLUSTER) $(if $(FOLLOW),--follow)

cancel: $(STAMP) ## ask a job to write its checkpoint and end: make cancel JOB=name CLUSTER=local2
	@$(BIN)/python -m cluster cancel $(JOB) --cluster $(CLUSTER)

cluster-down: $(STAMP) ## end exactly what cluster-up started, jobs first, and say what is left
	@$(BIN)/python -m cluster down --cluster $(CLUSTER)

# The tests start some hundred processes: what is imported is compiled once, also where the environment forbids to keep it.
test test-slow test-cluster: export PYTHONDONTWRITEBYTECODE :=
# Ray's workers give way to everything else (nice 15): beside busy tests a training of a minute took nine.
test test-slow test-cluster: export RAY_worker_niceness := 0

test: $(STAMP) ## the test suite, without the slow and GPU tests
	$(BIN)/python -m pytest -x -q -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder -m "not slow and not gpu" tests

test-slow: $(STAMP) ## the slow tests, two minutes of fuzzing among them: an hour on quick cores, two and more on slow ones
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder -m "slow and not gpu" tests

test-gpu: export RAY_worker_niceness := 0
test-gpu: $(STAMP) ## the tests that need a CUDA device: its numbers against the CPU's, stages on GPU actors; then what is compiled
	$(BIN)/python -m pytest -q -m gpu tests
	JAXTYPING_DISABLE=1 $(BIN)/python -m pytest -q -o addopts="--import-mode=importlib" -m gpu -k "compiled" tests/repfusion/test_on_gpu.py

test-cluster: $(STAMP) ## a whole deployment here: 4 nodes with a token, S3, PostgreSQL, MLflow with passwords; two workers are killed; about 10 minutes
	$(BIN)/python -m pytest -v tests/cluster/test_deployment.py

fuzz: $(STAMP) ## broken inputs into the real readers: make fuzz MINUTES=5 SET="--seed 7 --targets tar image"
	@$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),5) $(SET)

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP) ## let ruff sort the imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

foundation: $(STAMP) ## train the shipped small models (repfusion/weights/), several hours on 2 cores; goes on where it was cut off. DEVICE=gpu: larger ones, into runs/foundation_gpu
	$(BIN)/python -m repfusion.foundation $(if $(filter gpu,$(DEVICE)),repfusion/foundation/gpu.yaml --out runs/foundation_gpu,repfusion/foundation/cpu.yaml --out runs/foundation --release) $(SET)

base: $(STAMP) ## pre-train the shipped base checkpoint on the foundation (about an hour on 2 cores)
	$(BIN)/python -m repfusion.foundation.base prepare --root runs/base
	$(BIN)/python -m repfusion.train repfusion/foundation/base.yaml
	$(BIN)/python -m repfusion.foundation.base release --checkpoints runs/base/train/checkpoints

unifusion-base: $(STAMP) ## train the shipped UniFusion checkpoint on the foundation (about an hour on 2 cores)
	$(BIN)/python -m pipelines run pipelines/configs/unifusion_base.yaml $(SET)
	$(BIN)/python -m repfusion.foundation.base release --checkpoints runs/unifusion_base/train/checkpoints --out repfusion/weights/unifusion

mlflow: $(STAMP) ## the tracked runs, on http://127.0.0.1:5000 (PORT=... for another): make mlflow ROOT=runs/my, or where MLFLOW_TRACKING_URI says
	@$(BIN)/python -m repfusion.tracking --port $(PORT) $(if $(ROOT),--root $(ROOT))

clean: ## remove what was made by runs and tests; .venv and repfusion/weights/ stay
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
