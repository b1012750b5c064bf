#!/usr/bin/env bash
# Generalisation, in the toy: what is learned from some modalities or tasks, asked about the others. Three
# settings: one modality and one task held out of all training data; MRI alone; diagnoses alone. In each, the
# base, SFT and GRPO with a rule reward on the expert questions (the way of Med-R1, arXiv 2503.13939), and one
# cycle of ours, after SFT and after GRPO.
#
#   bash benchmarks/transfer.sh                          into runs/transfer; the same command resumes
#   SEEDS=0 SMALLEST=1 OUT=runs/t bash benchmarks/transfer.sh       the smallest, to see that it works
#
# The generator's and the backbone's pre-training had all modalities and tasks. Ends with
# benchmarks/results/transfer_SETTING.json and their tables in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/transfer}
SEEDS=${SEEDS:-0 1 2}
SMALLEST=${SMALLEST:-}
. ./setup.sh requirements.txt
export PYTHON CYCLES=1
SIZES="200 200 600 200 400" GRPO_FLAGS=${GRPO_FLAGS:-}
if [ -n "$SMALLEST" ]; then
  SIZES="40 24 40 8 8"
  export SFT_FLAGS="--steps 2" REWARD_FLAGS="--resamples 1 --steps 50" SCORE_FLAGS="--keep 0.5"
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1"
fi
export GRPO_FLAGS

rows=("base=eval_base" "SFT on expert data=eval_sft_expert" "GRPO, rule reward=eval_rule"
      "SFT on expert data + GRPO, rule reward=eval_sft_rule" "ours: SFT=cycle1/eval_sft"
      "ours: + GRPO=cycle1/eval_grpo")

# rule FROM NAME: GRPO with the answer match alone, on the expert questions.
rule() {
  local model=$d/$2 common="--image-root $IMAGE_ROOT --seed $s"
  [ -e "$model" ] || "$PYTHON" grpo.py --model "$1" --reward "$d/cycle1/reward" --alpha 0 --beta 1 \
    --data "$EXPERT" --val "$VAL" --test "$TEST" --out "$model" $common $GRPO_FLAGS
  [ -e "$d/eval_$2" ] || "$PYTHON" eval.py --model "$model" --data "$TEST" --out "$d/eval_$2" $common
}

# subset FILE FIELD=VALUE OUT: the records of FILE with that value.
subset() {
  [ -e "$3" ] || "$PYTHON" benchmarks/subset.py "$1" --where "$2" --out "$3"
}

# setting NAME EXPERT REPORTS IMAGES: one cycle and both rule rewards, on these training files.
setting() {
  d=$OUT/seed$s/$1
  export EXPERT=$2 REPORTS=$3 IMAGES=$4 VAL=$data/val.jsonl TEST=$data/test.jsonl IMAGE_ROOT=$OUT/seed$s
  export GENERATE_FLAGS="--per-image 2 --tasks-of $2"
  OUT=$d SEED=$s bash cycle.sh
  rule toy/policy rule
  rule "$d/sft_expert" sft_rule
}

for s in $SEEDS; do
  data=$OUT/seed$s/data own=$OUT/seed$s
  "$PYTHON" toy/clinic.py --out "$data" --seed "$s" --sizes $SIZES
  # A report tells what all tasks ask for, so only the setting that leaves out no task has reports.
  setting heldout "$data/heldout/expert.jsonl" "" "$data/heldout/unlabelled/images.jsonl"
  subset "$data/expert.jsonl" modality=MRI "$own/mri.jsonl"
  subset "$data/reports.jsonl" modality=MRI "$own/mri_reports.jsonl"
  subset "$data/unlabelled/images.jsonl" modality=MRI "$own/mri_images.jsonl"
  setting mri "$own/mri.jsonl" "$own/mri_reports.jsonl" "$own/mri_images.jsonl"
  subset "$data/expert.jsonl" "task=Disease Diagnosis" "$own/diagnosis.jsonl"
  setting diagnosis "$own/diagnosis.jsonl" "" "$data/unlabelled/images.jsonl"
done
for name in heldout mri diagnosis; do
  folders=()
  for s in $SEEDS; do folders+=("$OUT/seed$s/$name"); done
  "$PYTHON" benchmarks/collect.py "transfer_$name" --runs "${folders[@]}" --rows "${rows[@]}" \
    --against "ours: + GRPO" --command "bash benchmarks/transfer.sh" ${SMALLEST:+--print}
done
