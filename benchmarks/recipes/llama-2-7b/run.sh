#!/usr/bin/env bash
# Llama-2-7B with the paper's settings. One device of 24 GB or more; several devices of that size each take a share of the prompts.
# PROCESSES=4 run.sh OUT starts one process a device.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
if [ "${PROCESSES:-1}" -gt 1 ]; then
    exec accelerate launch --num_processes "$PROCESSES" -m icrouting.cli fit --model meta-llama/Llama-2-7b-hf "${settings[@]}"
fi
exec icr fit --model meta-llama/Llama-2-7b-hf "${settings[@]}"
