# The paper's fit of one model, sourced by the run.sh of each recipe, which names the model and how to launch it.
#
#     run.sh OUT [more options of icr fit]      fits the router; killed and started again, it goes on
#     DRY=1 run.sh OUT                          prints what the fit takes; reads the config.json beside it and no weights
#
# DATA is "hub" or a folder with NAME/train.jsonl and NAME/test.jsonl. The paper takes 10,000 prompts of AG News and 5,000
# of each other source task; `icr fit` has one number for all, 5,000. `--n-prompts 10000` gives the 10,000 of AG News,
# and of the others as many as they have training rows.
out=${1:?where the router goes: run.sh OUT}
paper="--rank 8 --basis pca --n-prompts 5000 --demos-per-class 5 --n-queries 5000 --max-tokens 512 --ce-scope vocabulary
    --lr 1e-4 --batch-size 4 --epochs 2 --min-steps 0 --patience 0
    --seed 42"
settings=(--data "${DATA:-hub}" --tasks agnews sst2 trec csqa piqa $paper --out "$out" "${@:2}")
if [ -n "${DRY:-}" ]; then
    exec python -m icrouting.cli fit --dry-run --model "$(dirname "$0")" "${settings[@]}"
fi
