#!/usr/bin/env bash
# What each part of the cycle adds, on a smaller clinic: the whole cycle, and the cycle without one part.
#
#   bash benchmarks/ablations.sh                         into runs/ablations; the same command resumes
#   SEEDS=0 SMALLEST=1 OUT=runs/a bash benchmarks/ablations.sh      the smallest, to see that it works
#
# Every variant has the same clinic and the same base models. Ends with
# benchmarks/results/ablations.json and its table in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/ablations}
SEEDS=${SEEDS:-0 1 2}
SMALLEST=${SMALLEST:-}
. ./setup.sh requirements.txt
. benchmarks/small_clinic.sh

rows=()
# variant FOLDER NAME [VARIABLE=VALUE...]: the cycle with these settings, for each seed.
variant() {
  local folder=$1 name=$2 s; shift 2
  for s in $SEEDS; do
    env "$@" OUT="$OUT/seed$s/$folder" SEED="$s" bash cycle.sh
  done
  rows+=("$name=$folder/cycle$CYCLES/eval_grpo")
}

variant full "the whole cycle"
# A rate of 0 leaves the generator as it is.
variant same_generator "generator never tuned" GENERATOR_FLAGS="--steps 1 --lr 0"
# No files after the flag: no rollouts.
variant same_reward "reward model never retrained" REWARD_FLAGS="$REWARD_FLAGS --rollouts"
variant random "random filter" FILTER=random
variant hidden "reward heads on the hidden state" REWARD_FLAGS="$REWARD_FLAGS --no-likelihood"
# As many candidates as three paradigms give.
variant direct "one paradigm" GENERATE_FLAGS="--per-image 6 --paradigms direct"
# As many rollouts for the next reward model, by a policy that stays as it is.
variant sft "no GRPO" GRPO_FLAGS="$GRPO_FLAGS --lr 0"

folders=()
for s in $SEEDS; do folders+=("$OUT/seed$s"); done
"$PYTHON" benchmarks/collect.py ablations --runs "${folders[@]}" --rows "${rows[@]}" \
  --against "the whole cycle" ${SMALLEST:+--print}
