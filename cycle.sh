#!/usr/bin/env bash
# The self-improving cycle: the stages in sequence, CYCLES times. By default on the toy clinic, into runs/toy.
#
#   bash cycle.sh                                  10 to 40 minutes on 2 CPU cores
#   OUT=runs/seed1 SEED=1 bash cycle.sh            another seed
#   GRPO=my_grpo.py OUT=runs/mine bash cycle.sh    an ablation: any stage's script can be replaced by another
#   DRY_RUN=1 ... bash cycle.sh                    shows every command and checks it; runs none
#
# A stage's output folder is final once it exists, so the same command resumes a run that was stopped and does
# nothing if the run is complete. A real run sets the variables below: docs/scale.md has an example.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh requirements.txt

OUT=${OUT:-runs/toy}
CYCLES=${CYCLES:-3}           # fixed once a run has started, because each cycle has its part of IMAGES
CONTROLS=${CONTROLS:-}        # if not empty, also train the controls that each gain is compared with
FILTER=${FILTER:-accepted}    # what SFT and the generator train on; random: as many candidates, drawn at random
SEED=${SEED:-0}
POLICY=${POLICY:-toy/policy}
GENERATOR=${GENERATOR:-toy/generator}
REWARD_BACKBONE=${REWARD_BACKBONE:-toy/backbone}
EXPERT=${EXPERT:-}            # expert questions; if empty, the toy clinic draws all data
REPORTS=${REPORTS:-}          # image-report pairs, or empty
IMAGES=${IMAGES:-}            # images to generate questions about; each cycle has its own part
VAL=${VAL:-}                  # expert questions for the watch
TEST=${TEST:-}                # expert questions for the table
IMAGE_ROOT=${IMAGE_ROOT:-}    # folder of all images: no record may name a file elsewhere
PLENTY=${PLENTY:-}            # plenty of expert questions, for the ceiling (CONTROLS), or empty
TRUTH=                        # the drawn facts of the toy's images
# The stages' scripts.
GENERATE=${GENERATE:-generate.py} REWARD=${REWARD:-reward.py} SFT=${SFT:-sft.py} GRPO=${GRPO:-grpo.py}
EVAL=${EVAL:-eval.py}
# Their flags, split at spaces. GRPO_FLAGS=--unlabelled (no file after it): GRPO on the questions of SFT alone.
# MORE_FLAGS: of the SFT in place of GRPO, CEILING_FLAGS: of the ceiling's SFT (both with CONTROLS).
GENERATE_FLAGS=${GENERATE_FLAGS:---per-image 2} REWARD_FLAGS=${REWARD_FLAGS:-}
SCORE_FLAGS=${SCORE_FLAGS:---threshold 8} SFT_FLAGS=${SFT_FLAGS:---steps 700}
GENERATOR_FLAGS=${GENERATOR_FLAGS:-} GRPO_FLAGS=${GRPO_FLAGS:-} MORE_FLAGS=${MORE_FLAGS:---lr 3e-4}
CEILING_FLAGS=${CEILING_FLAGS:---steps 3000}
EVAL_FLAGS=${EVAL_FLAGS:-}
CLINIC_FLAGS=${CLINIC_FLAGS:-}
LAUNCH=${LAUNCH:-}            # for several GPUs: LAUNCH="accelerate launch --num_processes 8"
DRY_RUN=${DRY_RUN:-}          # if not empty, run no stage: check files, flags, DISK_GB and PLANS
DISK_GB=${DISK_GB:-0}         # free disk that OUT needs
GPU_GB=${GPU_GB:-} PLANS=${PLANS:-}    # memory of a GPU, and rows of benchmarks/memory.py that must fit it

fail() { echo "cycle.sh: $1" >&2; exit 2; }

# How many seconds a launcher that got a signal gives its processes to end a step and commit; else 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# A stage runs in the background, because bash handles no signal while a command runs in the foreground. So a
# signal sent to this shell alone reaches the stage, or its launcher, which passes it on. The stage commits and
# exits. A second Ctrl-C kills it; the processes of a launcher that was killed end by themselves.
stop() {
  trap 'kill -KILL $(jobs -p) 2>/dev/null || :; exit 130' INT
  kill $(jobs -p) 2>/dev/null || :
  wait
  echo "cycle.sh: stopped; the same command resumes it" >&2
  exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
run() { "$@" & wait $!; }

# stage FOLDER SCRIPT FLAGS...: run the script, started by LAUNCH if given, unless its output folder exists.
stage() {
  local folder=$1; shift
  [ -e "$folder" ] || run ${LAUNCH:-"$PYTHON"} "$@" --image-root "$IMAGE_ROOT" --out "$folder" --seed "$SEED"
}

# [FROM=MODEL] [MORE=FLAGS] sft FOLDER DATA...: train the policy, from its base unless FROM is given, and
# evaluate it. --test refuses data with test images.
sft() {
  local folder=$1; shift
  stage "$folder" "$SFT" --model "${FROM:-$POLICY}" --data "$@" --test "$TEST" $SFT_FLAGS ${MORE:-}
  evaluate "$folder"
}

# evaluate MODEL [FOLDER]: by default into the folder beside the model with eval_ before its name.
evaluate() {
  stage "${2:-$(dirname "$1")/eval_$(basename "$1")}" "$EVAL" --model "$1" --data "$TEST" $EVAL_FLAGS
}

case $FILTER in
  accepted | random) ;;
  *) fail "FILTER=$FILTER: give accepted or random" ;;
esac
[ "$FILTER" = accepted ] || [ -z "$CONTROLS" ] ||
  fail "FILTER=$FILTER: the CONTROLS compare with accepted; leave one of them out"

started=$SECONDS
if [ -z "$EXPERT" ]; then
  [ -e "$OUT/table.txt" ] || echo "The default cycle on the toy clinic takes 10 to 40 minutes on 2 CPU cores."
  "$PYTHON" toy/clinic.py --out "$OUT/data" --seed "$SEED" ${CONTROLS:+--plenty 1000} $CLINIC_FLAGS
  EXPERT=$OUT/data/expert.jsonl REPORTS=$OUT/data/reports.jsonl IMAGES=$OUT/data/unlabelled/images.jsonl
  VAL=$OUT/data/val.jsonl TEST=$OUT/data/test.jsonl TRUTH=$OUT/data/unlabelled/truth.jsonl
  IMAGE_ROOT=$OUT/data PLENTY=${CONTROLS:+$OUT/data/plenty.jsonl}
fi
for v in IMAGES VAL TEST IMAGE_ROOT; do
  [ -n "${!v}" ] || fail "EXPERT is given and $v is not; give $v too"
done
# Checked now, not when a stage needs the file days later.
for v in EXPERT REPORTS IMAGES VAL TEST PLENTY; do
  [ -z "${!v}" ] || [ -f "${!v}" ] || fail "$v=${!v}: no such file; correct it"
done

# Stages whose folders exist are skipped, so a folder must hold only one cycle.
settings=$(
  for v in SEED POLICY GENERATOR REWARD_BACKBONE EXPERT REPORTS IMAGES VAL TEST PLENTY CYCLES CONTROLS \
    FILTER GENERATE REWARD SFT GRPO EVAL GENERATE_FLAGS REWARD_FLAGS SCORE_FLAGS SFT_FLAGS GENERATOR_FLAGS \
    GRPO_FLAGS MORE_FLAGS CEILING_FLAGS EVAL_FLAGS CLINIC_FLAGS; do
    echo "$v=${!v}"
  done
)
if [ -n "$DRY_RUN" ]; then
  . recipes/dry_run.sh
elif [ ! -e "$OUT/settings" ]; then
  mkdir -p "$OUT"
  # Renamed when complete, so that it is never half written.
  echo "$settings" > "$OUT/settings.tmp"
  mv "$OUT/settings.tmp" "$OUT/settings"
fi
if [ -e "$OUT/settings" ] && [ "$settings" != "$(cat "$OUT/settings")" ]; then
  fail "$OUT holds a cycle with other settings ($OUT/settings); choose another OUT or remove it"
fi

evaluate "$POLICY" "$OUT/eval_base"
sft "$OUT/sft_expert" "$EXPERT"
rows=("base=$OUT/eval_base/metrics.json" "SFT on expert data=$OUT/eval_sft_expert/metrics.json")
if [ -n "$CONTROLS" ] && [ -n "$PLENTY" ]; then
  MORE=$CEILING_FLAGS sft "$OUT/ceiling" "$PLENTY"
  rows+=("ceiling: SFT on plenty of expert data=$OUT/eval_ceiling/metrics.json")
fi

policy=$POLICY generator=$GENERATOR scored=() accepted=() random=() rollouts=()
# Where the controls of a cycle start.
random_policy=$POLICY first_policy=$OUT/cycle1/sft
for c in $(seq "$CYCLES"); do
  d=$OUT/cycle$c
  stage "$d/reward" "$REWARD" train --model "$REWARD_BACKBONE" --data "$EXPERT" ${REPORTS:+"$REPORTS"} \
    --rollouts ${rollouts[@]+"${rollouts[@]}"} $REWARD_FLAGS
  stage "$d/candidates" "$GENERATE" --model "$generator" --images "$IMAGES" --part "$c/$CYCLES" --cycle "$c" \
    $GENERATE_FLAGS
  stage "$d/scored" "$REWARD" score --model "$d/reward" --data "$d/candidates/candidates.jsonl" $SCORE_FLAGS
  # SFT on the expert questions and all that was accepted so far. GRPO also has the other candidates, without
  # their answers. The next cycle starts from its policy.
  scored+=("$d/scored/scored.jsonl") accepted+=("$d/scored/$FILTER.jsonl") random+=("$d/scored/random.jsonl")
  FROM=$policy sft "$d/sft" "${accepted[@]}" "$EXPERT"
  rows+=("cycle $c: SFT on $FILTER=$d/eval_sft/metrics.json")
  stage "$d/grpo" "$GRPO" --model "$d/sft" --reward "$d/reward" --data "${accepted[@]}" "$EXPERT" \
    --unlabelled "${scored[@]}" --val "$VAL" --test "$TEST" $GRPO_FLAGS
  evaluate "$d/grpo"
  policy=$d/grpo
  rows+=("cycle $c: + GRPO=$d/eval_grpo/metrics.json" "cycle $c: + GRPO=$d/reward/metrics.json")
  rollouts+=("$d/grpo/rollouts.jsonl")
  if [ -n "$TRUTH" ]; then
    [ -e "$d/marks.json" ] ||
      "$PYTHON" toy/mark.py --scored "$d/scored" --truth "$TRUTH" --out "$d/marks.json"
    rows+=("cycle $c: + GRPO=$d/marks.json")
  fi
  if [ -n "$CONTROLS" ]; then
    # SFT on as many candidates at random; on cycle 1's accepted alone; in GRPO's place, on SFT's questions.
    FROM=$random_policy sft "$d/sft_random" "${random[@]}" "$EXPERT"
    random_policy=$d/sft_random
    [ "$c" -eq 1 ] || {
      FROM=$first_policy sft "$d/sft_first" "${accepted[0]}" "$EXPERT"
      first_policy=$d/sft_first
      rows+=("cycle $c: SFT on accepted of cycle 1=$d/eval_sft_first/metrics.json")
    }
    steps=$(wc -l < "$d/grpo/metrics.jsonl")
    FROM=$d/sft MORE="--steps $steps $MORE_FLAGS" sft "$d/sft_more" "${accepted[@]}" "$EXPERT"
    rows+=("cycle $c: SFT on random=$d/eval_sft_random/metrics.json"
           "cycle $c: + as many SFT steps=$d/eval_sft_more/metrics.json")
    # The same candidates in each cycle, those of cycle 1, to see whether the reward model drifts.
    frozen=$d/scored
    [ "$c" -eq 1 ] || {
      frozen=$d/frozen_scored
      stage "$frozen" "$REWARD" score --model "$d/reward" --data "$OUT/cycle1/candidates/candidates.jsonl" \
        $SCORE_FLAGS
    }
    [ -z "$TRUTH" ] || [ -e "$d/frozen.json" ] ||
      "$PYTHON" toy/mark.py --scored "$frozen" --truth "$TRUTH" --out "$d/frozen.json"
  fi
  # The next cycle's generator learns from what this one accepted.
  if [ "$c" -lt "$CYCLES" ]; then
    stage "$d/generator" "$SFT" --role generator --model "$generator" --data "$d/scored/$FILTER.jsonl" \
      $GENERATOR_FLAGS
    generator=$d/generator
  fi
done

if [ -n "$DRY_RUN" ]; then
  echo "dry run: files, flags, disk and memory plan are in order; nothing was run"
  exit 0
fi
fields=(accuracy low high auroc ${TRUTH:+right_scored right_accepted})
if [ -n "$TRUTH" ]; then
  on="on the candidates, and the fractions of right candidates of all scored and of the accepted."
else
  on="on held-out expert questions."
fi
{
  "$PYTHON" -m analysis.summarize "${rows[@]}" --fields "${fields[@]}"
  echo "Accuracy on TEST, 95% interval. Beside + GRPO: AUROC of the cycle's reward model, right vs. wrong,"
  echo "$on"
} | tee "$OUT/table.txt.tmp"
mv "$OUT/table.txt.tmp" "$OUT/table.txt"
"$PYTHON" -m analysis.report --run "$OUT" --image-root "$IMAGE_ROOT" --out "$OUT/report.html"
echo "all in $OUT; this call took $(((SECONDS - started + 30) / 60)) minutes"
