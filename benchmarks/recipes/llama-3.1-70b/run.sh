#!/usr/bin/env bash
# Llama-3.1-70B with the paper's settings. 141 GB of weights in bfloat16: two devices of 80 GB with little to spare, or three, over which the layers are spread.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
exec icr fit --model meta-llama/Llama-3.1-70B --device-map auto "${settings[@]}"
