#!/usr/bin/env bash
# The paper's Figure 2 on the toy: SFT on k generated records, chosen at random or by reward, and GRPO after
# SFT by reward.
#
#   bash benchmarks/efficiency.sh                        into runs/efficiency; the same command resumes
#   SEEDS=0 SIZES=8 OUT=runs/e CLINIC_FLAGS="--sizes 12 6 16 8 8" REWARD_FLAGS="--resamples 1 --steps 50" \
#   GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8" bash benchmarks/efficiency.sh   the smallest
#
# Both choices of k records are those of `reward.py score --top-k`, as many of each task and modality. GRPO
# trains only on the same k records. Ends with OUT/curve: metrics.json, efficiency.svg, efficiency.png.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/efficiency}
SEEDS=${SEEDS:-0 1 2}
SIZES=${SIZES:-100 200 400 800}
POLICY=${POLICY:-toy/policy}
GENERATOR=${GENERATOR:-toy/generator}
REWARD_BACKBONE=${REWARD_BACKBONE:-toy/backbone}
CLINIC_FLAGS=${CLINIC_FLAGS:---sizes 100 200 600 200 800}
REWARD_FLAGS=${REWARD_FLAGS:-} GENERATE_FLAGS=${GENERATE_FLAGS:-} SFT_FLAGS=${SFT_FLAGS:-}
GRPO_FLAGS=${GRPO_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}
. benchmarks/stages.sh SEEDS SIZES POLICY GENERATOR REWARD_BACKBONE CLINIC_FLAGS REWARD_FLAGS GENERATE_FLAGS \
  SFT_FLAGS GRPO_FLAGS EVAL_FLAGS

runs=()
for s in $SEEDS; do
  d=$OUT/seed$s
  evaluate() {  # evaluate MODEL FOLDER
    stage "$2" "$s" eval.py --model "$1" --data "$d/data/test.jsonl" $EVAL_FLAGS
  }
  "$PYTHON" toy/clinic.py --out "$d/data" --seed "$s" $CLINIC_FLAGS
  evaluate "$POLICY" "$d/eval_base"
  runs+=("base:0=$d/eval_base")
  stage "$d/reward" "$s" reward.py train --model "$REWARD_BACKBONE" \
    --data "$d/data/expert.jsonl" "$d/data/reports.jsonl" $REWARD_FLAGS
  stage "$d/candidates" "$s" generate.py --model "$GENERATOR" \
    --images "$d/data/unlabelled/images.jsonl" $GENERATE_FLAGS
  for k in $SIZES; do
    stage "$d/k$k/scored" "$s" reward.py score --model "$d/reward" \
      --data "$d/candidates/candidates.jsonl" --top-k "$k"
    stage "$d/k$k/random" "$s" sft.py --model "$POLICY" --data "$d/k$k/scored/random.jsonl" $SFT_FLAGS
    stage "$d/k$k/top" "$s" sft.py --model "$POLICY" --data "$d/k$k/scored/accepted.jsonl" $SFT_FLAGS
    stage "$d/k$k/grpo" "$s" grpo.py --model "$d/k$k/top" --reward "$d/reward" \
      --data "$d/k$k/scored/accepted.jsonl" --val "$d/data/val.jsonl" $GRPO_FLAGS
    for method in random top grpo; do evaluate "$d/k$k/$method" "$d/k$k/eval_$method"; done
    runs+=("random-k:$k=$d/k$k/eval_random" "top-k:$k=$d/k$k/eval_top" "top-k + GRPO:$k=$d/k$k/eval_grpo")
  done
done
stage "$OUT/curve" 0 -m analysis.efficiency "${runs[@]}"
echo "all in $OUT"
