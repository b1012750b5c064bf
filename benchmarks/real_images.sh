#!/usr/bin/env bash
# The cycle on real images: genuine OmniMedVQA questions (`kind` omnimed) and questions made from labels (`kind`
# label) of eight modalities, with small models that are trained here from scratch (benchmarks/real_images.py
# says who has seen which labels).
#
#   DATA=omnimed_mini bash benchmarks/real_images.sh            into runs/real_images; the same command resumes
#   DATA=omnimed_mini SEEDS=0 SMALLEST=1 bash benchmarks/real_images.sh
#
# DATA: a folder with train.jsonl and test.jsonl, records with `dataset`, `kind` and `group`, and their images.
# OmniMedVQA's questions are public; its images come from the data sets that it names, each under its licence.
# Writes numbers to benchmarks/results/real_*.json and docs/results.md and draws docs/figures/real.svg; no image of
# DATA and no weight leaves OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-}
[ -f "$DATA/train.jsonl" ] && [ -f "$DATA/test.jsonl" ] || {
  echo "real_images.sh: DATA=$DATA: no train.jsonl and test.jsonl there; see the top of this script" >&2
  exit 2
}
# A modality and a task that the held-out setting trains nothing on.
UNSEEN_MODALITY=Ultrasound UNSEEN_TASK="Lesion Grading"
STEPS="" RULE_FLAGS=${RULE_FLAGS:---steps 100}
export SFT_FLAGS=${SFT_FLAGS:---steps 500} CEILING_FLAGS=${CEILING_FLAGS:---steps 1500} CONTROLS=1
export GRPO_FLAGS=${GRPO_FLAGS:---steps 50 --max-new-tokens 48} EVAL_FLAGS="--max-new-tokens 48"
export SCORE_FLAGS=${SCORE_FLAGS:---threshold 8} CYCLES=${CYCLES:-2} REWARD_FLAGS=""
ASKING="--paradigms direct --per-image 4"
if [ -n "${SMALLEST:-}" ]; then
  STEPS="--steps 2 2" RULE_FLAGS="--steps 1" SFT_FLAGS="--steps 2" CEILING_FLAGS="--steps 2" CYCLES=1
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1 --max-new-tokens 8"
  REWARD_FLAGS="--resamples 1 --steps 20" SCORE_FLAGS="--keep 0.5" EVAL_FLAGS="--max-new-tokens 4"
fi
. benchmarks/claims.sh DATA RULE_FLAGS SFT_FLAGS CEILING_FLAGS GRPO_FLAGS EVAL_FLAGS SCORE_FLAGS CYCLES
case $OUT in *" "*) echo "real_images.sh: OUT=$OUT: choose a path without spaces" >&2; exit 2 ;; esac
data=$OUT/data models=$OUT/models
export POLICY=$models/policy GENERATOR=$models/generator REWARD_BACKBONE=$models/backbone

helper() { "$PYTHON" benchmarks/real_images.py "$@"; }
[ -e "$data/plenty.jsonl" ] || helper split --data "$DATA" --out "$data"
[ -e "$models/backbone/config.json" ] ||
  helper models --data "$data" --image-root "$DATA" --out "$models" $STEPS

# cycle FOLDER EXPERT IMAGES PLENTY
cycle() {
  EXPERT=$2 IMAGES=$3 PLENTY=$4 VAL=$data/val.jsonl TEST=$data/test.jsonl IMAGE_ROOT=$DATA OUT=$1 SEED=$s \
    GENERATE_FLAGS="$ASKING --tasks-of $2" bash cycle.sh
}

# rule FOLDER EXPERT: GRPO with the answer match alone from the expert questions' SFT (as in Med-R1).
rule() {
  stage "$1/rule" "$s" "$DATA" grpo.py --model "$1/sft_expert" --reward "$1/cycle1/reward" --alpha 0 --beta 1 \
    --val "$data/val.jsonl" --test "$data/test.jsonl" $GRPO_FLAGS $RULE_FLAGS --data "$2"
  stage "$1/eval_rule" "$s" "$DATA" eval.py --model "$1/rule" --data "$data/test.jsonl" $EVAL_FLAGS
}

helper held-out --data "$data" --modality "$UNSEEN_MODALITY" --task "$UNSEEN_TASK" --out "$OUT/held_out"
for s in $SEEDS; do
  d=$OUT/seed$s
  cycle "$d/all" "$data/expert.jsonl" "$data/images.jsonl" "$data/plenty.jsonl"
  rule "$d/all" "$data/expert.jsonl"
  for c in $(seq "$CYCLES"); do
    helper marks --scored "$d/all/cycle$c/scored" --truth "$data/truth.jsonl" --out "$d/all/cycle$c/marks.json"
  done
  stage "$d/eval_blind" "$s" "$DATA" eval.py --model "$d/all/cycle$CYCLES/grpo" --data "$data/test.jsonl" \
    $EVAL_FLAGS --blind
  helper baselines --eval "$d/eval_blind" --train "$data/plenty.jsonl" --out "$d/all"
  CYCLES=1 CONTROLS= cycle "$d/held_out" "$OUT/held_out/expert.jsonl" "$OUT/held_out/images.jsonl" ""
  rule "$d/held_out" "$OUT/held_out/expert.jsonl"
done

rows=("base=eval_base" "SFT on the expert tenth=eval_sft_expert" "GRPO on it, rule reward=eval_rule")
for c in $(seq "$CYCLES"); do
  rows+=("cycle $c: SFT on random=cycle$c/eval_sft_random" "cycle $c: SFT on accepted=cycle$c/eval_sft"
         "cycle $c: + as many SFT steps=cycle$c/eval_sft_more" "cycle $c: + GRPO=cycle$c/eval_grpo")
done
rows+=("ceiling: SFT on all expert questions=eval_ceiling" "most frequent answer=eval_majority"
       "most frequent position=eval_position" "the last policy without the image=eval_blind")
against="cycle $CYCLES: + GRPO"
collect real_headline all "$against" --rows "${rows[@]}" --only headline=True --kind kind
collect real_omnimed all "$against" --rows "${rows[@]}" --only kind=omnimed --kind dataset
collect real_label all "$against" --rows "${rows[@]}" --only kind=label --kind dataset
collect real_held_out held_out "ours: + GRPO" --unseen "modality=$UNSEEN_MODALITY" "task=$UNSEEN_TASK" --rows \
  "base=eval_base" "SFT on expert data=eval_sft_expert" "GRPO on it, rule reward=eval_rule" \
  "ours: SFT=cycle1/eval_sft" "ours: + GRPO=cycle1/eval_grpo"
[ -n "$SMALLEST" ] || "$PYTHON" benchmarks/real_report.py --runs $(for s in $SEEDS; do echo "$OUT/seed$s/all"; done)
