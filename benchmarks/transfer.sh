#!/usr/bin/env bash
# The paper's Figure 4 on the toy: SFT on K expert records of one modality (or task) each, evaluated on all.
#
#   bash benchmarks/transfer.sh                          into runs/transfer; the same command resumes
#   K=4 OUT=runs/t CLINIC_FLAGS="--sizes 64 1 1 1 40" bash benchmarks/transfer.sh    the smallest
#
# Ends with OUT/by_modality and OUT/by_task: metrics.json, transfer.svg, transfer.png. There are two more
# rows: `base` (no training) and `all` (K records of any kind).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/transfer}
SEED=${SEED:-0}
POLICY=${POLICY:-toy/policy}
K=${K:-240}                   # records to train on
BY=${BY:-modality task}
CLINIC_FLAGS=${CLINIC_FLAGS:---sizes 800 1 1 1 800}
SFT_FLAGS=${SFT_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}
. benchmarks/stages.sh SEED POLICY K BY CLINIC_FLAGS SFT_FLAGS EVAL_FLAGS

# tune_on FOLDER [--where FIELD=VALUE]: K such records into FOLDER/data.jsonl, then FOLDER/sft, FOLDER/eval.
tune_on() {
  local folder=$1; shift
  mkdir -p "$folder"
  [ -e "$folder/data.jsonl" ] ||
    "$PYTHON" benchmarks/subset.py "$OUT/data/expert.jsonl" "$@" --k "$K" --seed "$SEED" \
      --out "$folder/data.jsonl"
  stage "$folder/sft" "$SEED" sft.py --model "$POLICY" --data "$folder/data.jsonl" $SFT_FLAGS
  stage "$folder/eval" "$SEED" eval.py --model "$folder/sft" --data "$OUT/data/test.jsonl" $EVAL_FLAGS
}

"$PYTHON" toy/clinic.py --out "$OUT/data" --seed "$SEED" $CLINIC_FLAGS
stage "$OUT/eval_base" "$SEED" eval.py --model "$POLICY" --data "$OUT/data/test.jsonl" $EVAL_FLAGS
tune_on "$OUT/all"
for by in $BY; do
  names=$([ "$by" = task ] && echo TASKS || echo MODALITIES) runs=()
  while read -r name; do
    folder=$OUT/$by/${name// /_}
    tune_on "$folder" --where "$by=$name"
    runs+=("$name=$folder/eval")
  done < <("$PYTHON" -c "from medgr2 import prompts; print(*sorted(prompts.$names), sep='\n')")
  runs+=("all=$OUT/all/eval" "base=$OUT/eval_base")
  stage "$OUT/by_$by" "$SEED" -m analysis.transfer "${runs[@]}" --by "$by"
done
echo "all in $OUT"
