#!/usr/bin/env bash
# The self-improving cycle: the stages in sequence, CYCLES times over. By default on the toy clinic, into runs/toy.
#
#   bash cycle.sh                          about 15 minutes on 2 CPU cores; again: does nothing, or goes on where it was stopped
#   OUT=runs/seed1 SEED=1 bash cycle.sh    another seed
#   GRPO=my_grpo.py OUT=runs/mine bash cycle.sh    an ablation: any stage's script can be swapped for another
#
# A real run sets the variables below; README.md has one. Each stage's output folder is final once it exists.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements.txt

OUT=${OUT:-runs/toy}
CYCLES=${CYCLES:-2}
SEED=${SEED:-0}
POLICY=${POLICY:-toy/policy}
GENERATOR=${GENERATOR:-toy/generator}
REWARD_BACKBONE=${REWARD_BACKBONE:-toy/backbone}
EXPERT=${EXPERT:-}            # question records of experts; empty: the toy clinic draws all data
REPORTS=${REPORTS:-}          # image-report pairs, or empty
IMAGES=${IMAGES:-}            # images to generate questions about
VAL=${VAL:-}                  # expert questions for the watch
TEST=${TEST:-}                # expert questions for the table
IMAGE_ROOT=${IMAGE_ROOT:-}    # folder that all images lie in: no record may name a file elsewhere
TRUTH=                        # the drawn facts of the toy's images
GENERATE=${GENERATE:-generate.py} REWARD=${REWARD:-reward.py} SFT=${SFT:-sft.py} GRPO=${GRPO:-grpo.py} EVAL=${EVAL:-eval.py}
# flags for the stages' scripts, split at spaces
GENERATE_FLAGS=${GENERATE_FLAGS:-} REWARD_FLAGS=${REWARD_FLAGS:-} SCORE_FLAGS=${SCORE_FLAGS:---keep 0.5}
SFT_FLAGS=${SFT_FLAGS:-} GENERATOR_FLAGS=${GENERATOR_FLAGS:-} GRPO_FLAGS=${GRPO_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}
LAUNCH=${LAUNCH:-}            # for several GPUs: LAUNCH="accelerate launch --num_processes 8"

# a stage runs in the background, because bash heeds no signal while a command runs in front; so one to this shell alone
# reaches the stage, which commits and leaves
trap 'kill $(jobs -p) 2>/dev/null || :; wait; exit 143' TERM INT
run() { "$@" & wait $!; }
stage() {  # stage FOLDER SCRIPT FLAGS...: run the script unless its folder is there
  local folder=$1; shift
  [ -e "$folder" ] || run "$PYTHON" "$@" --image-root "$IMAGE_ROOT" --out "$folder" --seed "$SEED"
}
launch() {  # the same for a stage that trains: on all GPUs with LAUNCH
  local folder=$1; shift
  [ -e "$folder" ] || run ${LAUNCH:-"$PYTHON"} "$@" --image-root "$IMAGE_ROOT" --out "$folder" --seed "$SEED"
}
sft() {  # sft FOLDER DATA...: the policy, from its base, and its evaluation; --test: refuses data that holds test images
  local folder=$1; shift
  launch "$folder" "$SFT" --model "$POLICY" --data "$@" --test "$TEST" $SFT_FLAGS
  evaluate "$folder"
}
evaluate() {  # evaluate MODEL [FOLDER]: beside the model, eval_ before its name
  stage "${2:-$(dirname "$1")/eval_$(basename "$1")}" "$EVAL" --model "$1" --data "$TEST" $EVAL_FLAGS
}

started=$SECONDS
if [ -z "$EXPERT" ]; then
  [ -e "$OUT/table.txt" ] || echo "The default cycle on the toy clinic takes about 15 minutes on 2 CPU cores."
  "$PYTHON" toy/clinic.py --out "$OUT/data" --seed "$SEED" ${CLINIC_FLAGS:-}
  EXPERT=$OUT/data/expert.jsonl REPORTS=$OUT/data/reports.jsonl IMAGES=$OUT/data/unlabelled/images.jsonl
  VAL=$OUT/data/val.jsonl TEST=$OUT/data/test.jsonl TRUTH=$OUT/data/unlabelled/truth.jsonl
  IMAGE_ROOT=$OUT/data
fi
for v in IMAGES VAL TEST IMAGE_ROOT; do
  [ -n "${!v}" ] || { echo "cycle.sh: EXPERT is given and $v is not; give $v too" >&2; exit 2; }
done
for v in EXPERT REPORTS IMAGES VAL TEST; do  # now, rather than when a stage comes to it after days
  [ -z "${!v}" ] || [ -f "${!v}" ] || { echo "cycle.sh: $v=${!v}: no such file; correct it" >&2; exit 2; }
done

# stages whose folders are there are skipped, so a folder must hold one cycle alone
settings=$(for v in SEED POLICY GENERATOR REWARD_BACKBONE EXPERT REPORTS IMAGES VAL TEST GENERATE REWARD SFT GRPO EVAL \
  GENERATE_FLAGS REWARD_FLAGS SCORE_FLAGS SFT_FLAGS GENERATOR_FLAGS GRPO_FLAGS EVAL_FLAGS; do echo "$v=${!v}"; done)
mkdir -p "$OUT"
[ -e "$OUT/settings" ] || { echo "$settings" > "$OUT/settings.tmp"; mv "$OUT/settings.tmp" "$OUT/settings"; }  # never half a file
if [ "$settings" != "$(cat "$OUT/settings")" ]; then
  echo "cycle.sh: $OUT holds a cycle with other settings ($OUT/settings); choose another OUT or remove it" >&2
  exit 2
fi

evaluate "$POLICY" "$OUT/eval_base"
sft "$OUT/sft_expert" "$EXPERT"
rows=("base=$OUT/eval_base/metrics.json" "SFT on expert data=$OUT/eval_sft_expert/metrics.json")

generator=$GENERATOR accepted=() random=() rollouts=()
for c in $(seq "$CYCLES"); do
  d=$OUT/cycle$c
  stage "$d/reward" "$REWARD" train --model "$REWARD_BACKBONE" --data "$EXPERT" ${REPORTS:+"$REPORTS"} --rollouts "${rollouts[@]}" $REWARD_FLAGS
  stage "$d/candidates" "$GENERATE" --model "$generator" --images "$IMAGES" --cycle "$c" $GENERATE_FLAGS
  stage "$d/scored" "$REWARD" score --model "$d/reward" --data "$d/candidates/candidates.jsonl" $SCORE_FLAGS
  [ -z "$TRUTH" ] || [ -e "$d/marks.json" ] || "$PYTHON" toy/mark.py --scored "$d/scored" --truth "$TRUTH" --out "$d/marks.json"
  # each cycle trains the policy from its base on all that was accepted so far: gone on from, a policy that has become better
  # than the generator is pulled back by SFT on the generator's data
  accepted+=("$d/scored/accepted.jsonl") random+=("$d/scored/random.jsonl")
  sft "$d/sft_random" "${random[@]}"
  sft "$d/sft" "${accepted[@]}"
  sft "$d/sft_both" "${accepted[@]}" "$EXPERT"  # GRPO practises on both: this row tells what the expert data does there by SFT
  # this cycle's accepted alone: among all of them the expert questions, whose answers are sure, would weigh less each cycle
  launch "$d/grpo" "$GRPO" --model "$d/sft" --reward "$d/reward" --data "$d/scored/accepted.jsonl" "$EXPERT" --val "$VAL" --test "$TEST" $GRPO_FLAGS
  evaluate "$d/grpo"
  rows+=("cycle $c: SFT on random=$d/eval_sft_random/metrics.json" "cycle $c: SFT on accepted=$d/eval_sft/metrics.json"
         "cycle $c: SFT on accepted + expert=$d/eval_sft_both/metrics.json" "cycle $c: + GRPO=$d/eval_grpo/metrics.json")
  rows+=("cycle $c: + GRPO=$d/reward/metrics.json" ${TRUTH:+"cycle $c: + GRPO=$d/marks.json"})
  rollouts+=("$d/grpo/rollouts.jsonl")
  if [ "$c" -lt "$CYCLES" ]; then  # the next cycle's generator learns from what this one accepted
    launch "$d/generator" "$SFT" --role generator --model "$generator" --data "$d/scored/accepted.jsonl" $GENERATOR_FLAGS
    generator=$d/generator
  fi
done

{ "$PYTHON" -m analysis.summarize "${rows[@]}" --fields accuracy low high auroc ${TRUTH:+right_scored right_accepted}
  echo "accuracy on TEST, its 95% interval; beside + GRPO what its cycle began with: AUROC of the reward model, right against wrong,"
  [ -n "$TRUTH" ] && echo "on the candidates; share of right candidates, of all scored and of the accepted" || echo "on held-out expert items"
} | tee "$OUT/table.txt.tmp"
mv "$OUT/table.txt.tmp" "$OUT/table.txt"
"$PYTHON" -m analysis.report --run "$OUT" --image-root "$IMAGE_ROOT" --out "$OUT/report.html"
echo "all in $OUT; this call took $(((SECONDS - started + 30) / 60)) minutes"
