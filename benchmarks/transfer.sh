#!/usr/bin/env bash
# Transfer on the toy: train on some modalities or tasks, test on the others. Three settings: one modality and
# one task held out of all training data; MRI alone; diagnoses alone. In each, the base, SFT and GRPO with a
# rule reward on the expert questions (as in Med-R1, arXiv 2503.13939), and one cycle of ours.
#
#   bash benchmarks/transfer.sh                      into runs/transfer; the same command resumes
#   SEEDS=0 SMALLEST=1 bash benchmarks/transfer.sh   into runs/transfer_smallest
#
# The generator's and the backbone's pre-training had all modalities and tasks. Ends with
# benchmarks/results/transfer_SETTING.json and their tables in docs/results.md.
set -euo pipefail
cd "$(dirname "$0")/.."
SIZES=${SIZES:-200 200 600 200 400}
# A rule reward without SFT before it has twice the steps: about the time of our SFT and GRPO.
RULE_FLAGS=${RULE_FLAGS:---steps 100}
export CYCLES=1 GRPO_FLAGS=${GRPO_FLAGS:---steps 50} SFT_FLAGS=${SFT_FLAGS:---steps 500}
if [ -n "${SMALLEST:-}" ]; then
  SIZES="40 24 40 8 8" SFT_FLAGS="--steps 2" RULE_FLAGS="--steps 1"
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1"
  export REWARD_FLAGS="--resamples 1 --steps 50" SCORE_FLAGS="--keep 0.5"
fi
. benchmarks/claims.sh SIZES RULE_FLAGS GRPO_FLAGS SFT_FLAGS
case $OUT in *" "*) echo "transfer.sh: OUT=$OUT: choose a path without spaces" >&2; exit 2 ;; esac

# rule FROM NAME FLAGS DATA...: GRPO with the answer match alone, and its evaluation. It needs answers, so it
# does not have the candidates that were not accepted, and the cycle's own GRPO has.
rule() {
  local from=$1 name=$2 flags=$3; shift 3
  stage "$d/$name" "$s" "$OUT/seed$s" grpo.py --model "$from" --reward "$d/cycle1/reward" --alpha 0 --beta 1 \
    --val "$data/val.jsonl" --test "$data/test.jsonl" $GRPO_FLAGS $flags --data "$@"
  stage "$d/eval_$name" "$s" "$OUT/seed$s" eval.py --model "$d/$name" --data "$data/test.jsonl"
}

# subset FILE FIELD=VALUE OUT: the records of FILE with that value.
subset() {
  [ -e "$3" ] || "$PYTHON" benchmarks/subset.py "$1" --where "$2" --out "$3"
}

# setting NAME EXPERT REPORTS IMAGES: one cycle and the rule rewards, on these training files.
setting() {
  d=$OUT/seed$s/$1
  EXPERT=$2 REPORTS=$3 IMAGES=$4 VAL=$data/val.jsonl TEST=$data/test.jsonl IMAGE_ROOT=$OUT/seed$s \
    GENERATE_FLAGS="--per-image 2 --tasks-of $2" OUT=$d SEED=$s bash cycle.sh
  rule toy/policy rule "$RULE_FLAGS" "$2"
  rule "$d/sft_expert" sft_rule "" "$2"
  rule "$d/cycle1/sft" ours_rule "" "$d/cycle1/scored/accepted.jsonl" "$2"
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

# table SETTING --seen FIELD=VALUE... or --unseen FIELD=VALUE...: which test questions were trained on or not.
table() {
  local setting=$1; shift
  collect "transfer_$setting" "$setting" "ours: + GRPO" "$@" --rows "base=eval_base" \
    "SFT on expert data=eval_sft_expert" "GRPO, rule reward=eval_rule" \
    "SFT on expert data + GRPO, rule reward=eval_sft_rule" "ours: SFT=cycle1/eval_sft" \
    "ours: + GRPO, rule reward=eval_ours_rule" "ours: + GRPO=cycle1/eval_grpo"
}

table heldout --unseen modality=OCT "task=Lesion Grading"
table mri --seen modality=MRI
table diagnosis --seen "task=Disease Diagnosis"
