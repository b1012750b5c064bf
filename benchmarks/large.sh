#!/usr/bin/env bash
# A compact policy with the cycle against a policy eleven times its size without it. Both were pre-trained by
# the same recipe; the large one is tuned on the expert questions, for as many steps as the compact one and for
# as many as its whole cycle took. On one core pre-training takes about 30 minutes, and each seed 25.
#
#   bash benchmarks/ablations.sh                     first: its whole cycle is the compact policy's
#   bash benchmarks/large.sh                         into runs/large; the same command resumes
#   SEEDS=0 SMALLEST=1 bash benchmarks/large.sh      into runs/large_smallest, after ablations.sh of that size
#
# Generator and backbone, which the cycle uses, have seen all modalities. Ends with
# benchmarks/results/large.json and its table in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# Finished runs of ablations.sh, without the seed.
RUNS=${RUNS:-runs/ablations${SMALLEST:+_smallest}/seed}
# The large policy's rate, the steps of the compact one's SFT, and those of its SFT and GRPO in all cycles.
LARGE_FLAGS=${LARGE_FLAGS:---lr 3e-4} SFT_FLAGS="--steps 500" AS_MANY="--steps 1650" CYCLES=3
[ -z "${SMALLEST:-}" ] || SFT_FLAGS="--steps 2" AS_MANY="--steps 3" CYCLES=2
. benchmarks/claims.sh RUNS LARGE_FLAGS SFT_FLAGS AS_MANY

# Its last file says that the model is complete.
[ -e "$OUT/policy/marks.json" ] || "$PYTHON" toy/pretrain.py --out "$OUT" --roles policy --tower toy/policy \
  --width 512 --layers 4 ${SMALLEST:+--steps 1 1}

# tune FOLDER FLAGS: the large policy's SFT on the expert questions, and its evaluation.
tune() {
  local folder=$1 flags=$2
  stage "$d/$folder" "$s" "$data" sft.py --model "$OUT/policy" --data "$data/expert.jsonl" \
    --test "$data/test.jsonl" $flags $LARGE_FLAGS
  stage "$d/eval_$folder" "$s" "$data" eval.py --model "$d/$folder" --data "$data/test.jsonl"
}

for s in $SEEDS; do
  d=$OUT/seed$s
  mkdir -p "$d"
  ln -sfn "$(cd "$RUNS$s/full" && pwd)" "$d/compact"
  data=$d/compact/data
  stage "$d/eval_large" "$s" "$data" eval.py --model "$OUT/policy" --data "$data/test.jsonl"
  tune large_expert "$SFT_FLAGS"
  tune large_expert_long "$AS_MANY"
done

collect large "" "compact: the cycle" --rows "compact: base=compact/eval_base" \
  "compact: SFT on expert data=compact/eval_sft_expert" "compact: the cycle=compact/cycle$CYCLES/eval_grpo" \
  "large: base=eval_large" "large: SFT on expert data=eval_large_expert" \
  "large: the same, as many steps as the cycle=eval_large_expert_long"
