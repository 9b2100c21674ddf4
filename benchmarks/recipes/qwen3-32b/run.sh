#!/usr/bin/env bash
# Qwen3-32B with the paper's settings. 65.5 GB of weights in bfloat16: one device of 80 GB, or two of 48 GB, over which the layers are spread.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
exec icr fit --model Qwen/Qwen3-32B --device-map auto "${settings[@]}"
