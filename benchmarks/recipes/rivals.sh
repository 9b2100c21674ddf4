#!/usr/bin/env bash
# Every rival beside a fitted router on the twelve tasks, fitted once on the five source tasks and used unchanged.
#
#     benchmarks/recipes/rivals.sh MODEL ROUTER OUT [N_TEST TRIES TRAIN_ROWS TRAIN_EPOCHS SEEDS METHODS]
#
# For instance benchmarks/recipes/rivals.sh pinned:smollm2-135m routers/smollm2-135m runs/rivals-once
# With "" for ROUTER, ICR's own controls are fitted on TRAIN_ROWS queries of a task; else as ROUTER was:
#     benchmarks/recipes/rivals.sh pinned:smollm2-135m "" runs/controls-once 100 1 30 5 0 \
#         "zero-shot icr-refit-once icr-random-basis-once icr-learned-directions-once icr-constant-once
#         icr-random-features-once icr-uniform-alpha-once icr-uniform-gates-once prefix-tuning-once"
# Methods without "-once" are fitted on every task's own labels (two and a half hours of fits on two
# busy cores), and are given another OUT:
#     benchmarks/recipes/rivals.sh pinned:smollm2-135m routers/smollm2-135m runs/rivals-in-domain 100 1 30 5 0 \
#         "zero-shot calibration icr task-vectors function-vectors icv elicit iterative-vectors i2cl live m2iv lora-block
#         lora-head lora-block-more prefix-tuning prompt-tuning probe-hidden probe-encoder"
# On the five source tasks alone, as the paper fits these, with the same methods and another OUT:
#     TASKS="agnews csqa sst2 trec piqa" benchmarks/recipes/rivals.sh ... runs/rivals-in-domain-sources 500 1 30 5 "0 1 2" ...
# Linear probes with as many rows as the router has seen queries:
#     benchmarks/recipes/rivals.sh pinned:smollm2-135m routers/smollm2-135m runs/probes 500 12 1000 10 0 \
#         "zero-shot icr probe-hidden probe-encoder"
# Killed and started again it goes on; more seeds and methods may be asked for later. The small sizes are what two
# CPU cores do in two hours.
set -euo pipefail
model=$1 router=$2 out=$3
n_test=${4:-100} tries=${5:-1} train_rows=${6:-30} train_epochs=${7:-5} seeds=${8:-"0"}
methods=${9:-"zero-shot calibration icr task-vectors-once function-vectors-once icv-once elicit-once
    iterative-vectors-once i2cl-once live-once m2iv-once lora-block-once lora-head-once lora-block-more-once
    prefix-tuning-once prompt-tuning-once"}
sources="agnews sst2 trec csqa piqa"
icr eval --model "$model" ${router:+--router "$router"} --data "${DATA:-../shared/data}" --sources $sources \
    --tasks ${TASKS:-$sources sst5 mr mrpc cb copa creak ai2scie} --methods $methods --n-test "$n_test" \
    --tries "$tries" --train-rows "$train_rows" --train-epochs "$train_epochs" --i2cl-epochs 20 \
    --encoder pinned:minilm --seeds $seeds --out "$out"
# PUBLISH_AS=name keeps the figures in the repository; then `python docs/results.py`.
if [ -n "${PUBLISH_AS:-}" ]; then
    mkdir -p "benchmarks/results/$PUBLISH_AS"
    cp "$out"/{config.json,report.md,report.csv,tried.csv} "benchmarks/results/$PUBLISH_AS"
    # Into a folder of their own first: nothing is overwritten, and what was published goes only when all is there.
    rm -rf "$out/answers"
    icr report "$out" --keep-answers "$out/answers"
    cp "$out/answers/answers.json" "benchmarks/results/$PUBLISH_AS"
fi
