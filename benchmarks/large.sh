#!/usr/bin/env bash
# A compact policy with the cycle against one of eleven times its size without: the large policy was
# pre-trained by the same recipe and is tuned on the expert questions.
#
#   bash benchmarks/large.sh                             into runs/large; the same command resumes
#   SEEDS=0 SMALLEST=1 OUT=runs/l bash benchmarks/large.sh          the smallest, to see that it works
#
# Ends with benchmarks/results/large.json and its table in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/large}
SEEDS=${SEEDS:-0 1 2}
SMALLEST=${SMALLEST:-}
LARGE_FLAGS=${LARGE_FLAGS:---lr 3e-4}    # of the large policy's SFT
. ./setup.sh requirements.txt
. benchmarks/small_clinic.sh

[ -e "$OUT/policy" ] || "$PYTHON" toy/pretrain.py --out "$OUT" --roles policy --tower toy/policy --width 512 \
  --layers 4 ${SMALLEST:+--steps 1 1}
for s in $SEEDS; do
  d=$OUT/seed$s
  OUT=$d SEED=$s bash cycle.sh
  common="--image-root $d --seed $s"
  [ -e "$d/large" ] || "$PYTHON" sft.py --model "$OUT/policy" --data "$d/data/expert.jsonl" \
    --test "$d/data/test.jsonl" --out "$d/large" $common $SFT_FLAGS $LARGE_FLAGS
  for model in "$OUT/policy" "$d/large"; do
    folder=$d/eval_large_$(basename "$model")
    [ -e "$folder" ] || "$PYTHON" eval.py --model "$model" --data "$d/data/test.jsonl" --out "$folder" $common
  done
done

folders=()
for s in $SEEDS; do folders+=("$OUT/seed$s"); done
rows=("compact: base=eval_base" "compact: SFT on expert data=eval_sft_expert"
      "compact: three cycles=cycle$CYCLES/eval_grpo" "large: base=eval_large_policy"
      "large: SFT on expert data=eval_large_large")
"$PYTHON" benchmarks/collect.py large --runs "${folders[@]}" --rows "${rows[@]}" \
  --against "compact: three cycles" ${SMALLEST:+--print}
