#!/usr/bin/env bash
# The twelve-task benchmark on one model: fit a router on the five source tasks, then compare methods on all twelve.
#
#     benchmarks/recipes/twelve-tasks.sh MODEL OUT [N_PROMPTS N_QUERIES N_TEST I2CL_EPOCHS SEEDS METHODS]
#
# For instance benchmarks/recipes/twelve-tasks.sh pinned:smollm2-135m runs/smollm2-135m
# Killed and started again it goes on; more seeds and methods may be asked for later. I2CL tries four settings; the tables
# published so far are of a version that had its first alone.
set -euo pipefail
model=$1 out=$2
n_prompts=${3:-100} n_queries=${4:-1000} n_test=${5:-500} i2cl_epochs=${6:-20} seeds=${7:-"0 1 2"}
methods=${8:-"zero-shot calibration few-shot multi-task-few-shot task-vectors i2cl icr"}
data=${DATA:-../shared/data}
sources="agnews sst2 trec csqa piqa"
icr fit --model "$model" --encoder pinned:minilm --data "$data" --tasks $sources \
    --n-prompts "$n_prompts" --n-queries "$n_queries" --out "$out/router"
icr eval --model "$model" --router "$out/router" --data "$data" --sources $sources \
    --tasks $sources sst5 mr mrpc cb copa creak ai2scie --methods $methods \
    --n-test "$n_test" --i2cl-epochs "$i2cl_epochs" --seeds $seeds --out "$out/run"
# PUBLISH_AS=name keeps the figures and the router in the repository; then `python docs/results.py`.
if [ -n "${PUBLISH_AS:-}" ]; then
    mkdir -p "benchmarks/results/$PUBLISH_AS" "routers/$PUBLISH_AS"
    cp "$out"/run/{config.json,report.md,report.csv} "benchmarks/results/$PUBLISH_AS"
    cp "$out"/router/{README.md,config.json,model.safetensors} "routers/$PUBLISH_AS"
fi
