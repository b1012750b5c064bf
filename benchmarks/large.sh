#!/usr/bin/env bash
# A compact policy with the cycle against a policy eleven times its size without it. Both were pre-trained by
# the same recipe; the large one is tuned on the expert questions, and, to compare, on what the compact one's
# cycles accepted.
#
#   bash benchmarks/large.sh                         into runs/large; the same command resumes
#   SEEDS=0 SMALLEST=1 bash benchmarks/large.sh      into runs/large_smallest
#
# Generator and backbone, which the cycle uses, have seen all modalities. Ends with
# benchmarks/results/large.json and its table in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
# Flags of the large policy's SFT, and as many steps as the SFT and GRPO of three cycles.
LARGE_FLAGS=${LARGE_FLAGS:---lr 3e-4} AS_MANY="--steps 1650"
export CYCLES=3 CLINIC_FLAGS="--sizes 100 200 300 200 400" SFT_FLAGS="--steps 500" GRPO_FLAGS="--steps 50"
if [ -n "${SMALLEST:-}" ]; then
  CYCLES=2 CLINIC_FLAGS="--sizes 12 6 8 8 8" SFT_FLAGS="--steps 2" AS_MANY="--steps 3"
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1"
  export REWARD_FLAGS="--resamples 1 --steps 50" SCORE_FLAGS="--keep 0.5"
fi
. benchmarks/claims.sh CYCLES CLINIC_FLAGS SFT_FLAGS GRPO_FLAGS LARGE_FLAGS AS_MANY

# Its last file says that the model is complete.
[ -e "$OUT/policy/marks.json" ] || "$PYTHON" toy/pretrain.py --out "$OUT" --roles policy --tower toy/policy \
  --width 512 --layers 4 ${SMALLEST:+--steps 1 1}

# tune FOLDER FLAGS DATA...: the large policy's SFT, and its evaluation.
tune() {
  local folder=$1 flags=$2; shift 2
  stage "$d/$folder" "$s" "$d" sft.py --model "$OUT/policy" --test "$d/data/test.jsonl" $flags $LARGE_FLAGS \
    --data "$@"
  stage "$d/eval_$folder" "$s" "$d" eval.py --model "$d/$folder" --data "$d/data/test.jsonl"
}

for s in $SEEDS; do
  d=$OUT/seed$s
  OUT=$d SEED=$s bash cycle.sh
  stage "$d/eval_large" "$s" "$d" eval.py --model "$OUT/policy" --data "$d/data/test.jsonl"
  tune large_expert "$SFT_FLAGS" "$d/data/expert.jsonl"
  tune large_expert_long "$AS_MANY" "$d/data/expert.jsonl"
  tune large_accepted "$AS_MANY" "$d"/cycle*/scored/accepted.jsonl "$d/data/expert.jsonl"
done

collect large "" "compact: the cycle" --rows "compact: base=eval_base" \
  "compact: SFT on expert data=eval_sft_expert" "compact: the cycle=cycle$CYCLES/eval_grpo" \
  "large: base=eval_large" "large: SFT on expert data=eval_large_expert" \
  "large: the same, as many steps as the cycle=eval_large_expert_long" \
  "large: SFT on the cycle's accepted, as many steps=eval_large_accepted"
