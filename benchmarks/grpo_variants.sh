#!/usr/bin/env bash
# What GRPO adds to the SFT of cycle 1, by the questions it learns from, its reward and its steps. On clinics
# that no other accuracy is reported of, because GRPO's defaults are chosen here.
#
#   bash benchmarks/grpo_variants.sh                      into runs/grpo_variants; the same command resumes
#   SEEDS=0 SMALLEST=1 bash benchmarks/grpo_variants.sh   into runs/grpo_variants_smallest
#
# One seed takes about 30 minutes on one core. Ends with benchmarks/results/grpo_variants.json and its table in
# docs/results.md. *Clean* questions are an expert's about images that the SFT has not seen.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-100 101 102}
export CYCLES=1 CLINIC_FLAGS="--sizes 100 200 120 200 800 --plenty 1000" GRPO_FLAGS="" REWARD_FLAGS=""
export SFT_FLAGS="--steps 700" SCORE_FLAGS="--threshold 8"
STEPS=200 LONG=600
if [ -n "${SMALLEST:-}" ]; then
  CLINIC_FLAGS="--sizes 12 6 8 8 8 --plenty 8" SFT_FLAGS="--steps 2" REWARD_FLAGS="--resamples 1 --steps 50"
  GRPO_FLAGS="--prompts 2 --group 4 --watch-items 8 --min-spread -1" SCORE_FLAGS="--keep 0.5"
  STEPS=1 LONG=2
fi
. benchmarks/claims.sh CYCLES CLINIC_FLAGS SFT_FLAGS REWARD_FLAGS GRPO_FLAGS SCORE_FLAGS STEPS LONG

rows=("SFT of cycle 1=cycle1/eval_sft")
# variant FOLDER NAME FILES FLAGS...: GRPO on these files of each seed's run, from its SFT, and its accuracy.
variant() {
  local folder=$1 name=$2 files=$3 s d; shift 3
  for s in $SEEDS; do
    d=$OUT/seed$s
    stage "$d/$folder" "$s" "$d/data" grpo.py --model "$d/cycle1/sft" --reward "$d/cycle1/reward" \
      --data $(printf "$d/%s " $files) --test "$d/data/test.jsonl" $GRPO_FLAGS "$@"
    stage "$d/eval_$folder" "$s" "$d/data" eval.py --model "$d/$folder" --data "$d/data/test.jsonl"
  done
  rows+=("$name=eval_$folder")
}

for s in $SEEDS; do
  GRPO_FLAGS="$GRPO_FLAGS --steps $STEPS" OUT="$OUT/seed$s" SEED="$s" bash cycle.sh
done
rows+=("the default=cycle1/eval_grpo")
accepted="cycle1/scored/accepted.jsonl data/expert.jsonl"
candidates="cycle1/scored/scored.jsonl data/expert.jsonl"
variant match "the match alone" "$accepted" --steps $STEPS --alpha 0 --beta 1
variant thrice "three updates on each batch of rollouts" "$accepted" --steps $STEPS --iterations 3
variant all "all candidates, the reward model alone" "$candidates" --steps $STEPS --alpha 1 --beta 0
variant clean "clean questions" data/plenty.jsonl --steps $STEPS
variant clean_long "clean questions, three times the steps" data/plenty.jsonl --steps $LONG

collect grpo_variants "" "SFT of cycle 1" --rows "${rows[@]}"
