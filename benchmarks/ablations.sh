#!/usr/bin/env bash
# What each part of the cycle adds, on a smaller clinic: the whole cycle, and the cycle without one part.
#
#   bash benchmarks/ablations.sh                     into runs/ablations; the same command resumes
#   SEEDS=0 SMALLEST=1 bash benchmarks/ablations.sh  into runs/ablations_smallest
#
# Every variant has the same clinic and the same base models. One seed takes about 65 minutes on one core.
# Ends with benchmarks/results/ablations.json and its table in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
export CYCLES=3 CLINIC_FLAGS="--sizes 100 200 300 200 400" SFT_FLAGS="--steps 500"
export GENERATE_FLAGS="--per-image 2" GRPO_FLAGS="--steps 50" REWARD_FLAGS="" SCORE_FLAGS="--threshold 8"
share="--keep 0.5"
if [ -n "${SMALLEST:-}" ]; then
  CYCLES=2 CLINIC_FLAGS="--sizes 12 6 8 8 8" SFT_FLAGS="--steps 2" REWARD_FLAGS="--resamples 1 --steps 50"
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1" SCORE_FLAGS=$share
fi
. benchmarks/claims.sh CYCLES CLINIC_FLAGS SFT_FLAGS GENERATE_FLAGS GRPO_FLAGS REWARD_FLAGS SCORE_FLAGS

rows=()
# [SAME="PART..."] variant FOLDER NAME [VARIABLE=VALUE...]: the cycle with these settings, for each seed. What
# it has in common with the whole cycle (all that precedes cycle 1, and these parts of it) is run once.
variant() {
  local folder=$1 name=$2 s part; shift 2
  for s in $SEEDS; do
    mkdir -p "$OUT/seed$s/$folder/cycle1"
    [ "$folder" = full ] || for part in eval_base sft_expert eval_sft_expert; do
      ln -sfn "../full/$part" "$OUT/seed$s/$folder/$part"
    done
    for part in ${SAME:-}; do ln -sfn "../../full/cycle1/$part" "$OUT/seed$s/$folder/cycle1/$part"; done
    env "$@" OUT="$OUT/seed$s/$folder" SEED="$s" bash cycle.sh
  done
  rows+=("$name=$folder/cycle$CYCLES/eval_grpo")
}

variant full "the whole cycle"
policy="reward candidates scored sft eval_sft grpo eval_grpo"
# A rate of 0 leaves the generator as it is.
SAME=$policy variant same_generator "generator never tuned" GENERATOR_FLAGS="--steps 1 --lr 0"
# No files after the flag: no rollouts.
SAME="$policy generator" variant same_reward "reward model never retrained" \
  REWARD_FLAGS="$REWARD_FLAGS --rollouts"
SAME="reward candidates scored" variant random "random filter" FILTER=random
# R of other heads is not on the same scale, so both of these accept half of each cell.
SAME="reward candidates" variant share "half accepted" SCORE_FLAGS="$share"
SAME=candidates variant hidden "half accepted, reward heads on the hidden state" SCORE_FLAGS="$share" \
  REWARD_FLAGS="$REWARD_FLAGS --no-likelihood"
# As many candidates as three paradigms give.
SAME=reward variant direct "one paradigm" GENERATE_FLAGS="--per-image 6 --paradigms direct"
# As many rollouts for the next reward model, by a policy that stays as it is.
SAME="reward candidates scored sft eval_sft generator" variant sft "no GRPO" GRPO_FLAGS="$GRPO_FLAGS --lr 0"

collect ablations "" "the whole cycle" --candidates --rows "${rows[@]}"
