#!/usr/bin/env bash
# How many expert questions are a cycle's accepted candidates worth? SFT on k expert questions, and SFT of
# cycle 1 at the number of questions that it was trained on (the paper's Figure 2). All take as many steps.
#
#   python benchmarks/seeds.py                       first: its runs have plenty of expert questions
#   bash benchmarks/efficiency.sh                    into runs/efficiency; the same command resumes
#
# Ends with benchmarks/results/figure_efficiency.json and docs/figures/efficiency.svg. The reward model behind
# the accepted candidates has also learned from the runs' 200 reports, which no k counts.
set -euo pipefail
cd "$(dirname "$0")/.."
# Finished runs of cycle.sh with CONTROLS=1, without the seed.
RUNS=${RUNS:-runs/seed}
# k beside the run's own expert questions.
SIZES=${SIZES:-600 1200 3000}
SFT_FLAGS=${SFT_FLAGS:---steps 700}
. benchmarks/claims.sh RUNS SIZES SFT_FLAGS

curve="SFT on expert questions" runs=() count=0 n=0
for s in $SEEDS; do
  d=$OUT/seed$s run=$RUNS$s
  mkdir -p "$d"
  runs+=("$curve:$(wc -l < "$run/data/expert.jsonl")=$run/eval_sft_expert")
  for k in $SIZES; do
    [ -e "$d/k$k.jsonl" ] ||
      "$PYTHON" benchmarks/subset.py "$run/data/plenty.jsonl" --k "$k" --seed "$s" --out "$d/k$k.jsonl"
    stage "$d/k$k" "$s" "$run" sft.py --model toy/policy --data "$d/k$k.jsonl" --test "$run/data/test.jsonl" \
      $SFT_FLAGS
    stage "$d/eval_k$k" "$s" "$run" eval.py --model "$d/k$k" --data "$run/data/test.jsonl"
    runs+=("$curve:$k=$d/eval_k$k")
  done
  count=$((count + $(cat "$run/data/expert.jsonl" "$run/cycle1/scored/accepted.jsonl" | wc -l))) n=$((n + 1))
done
# At the mean number of questions.
for s in $SEEDS; do runs+=("SFT on accepted and expert:$((count / n))=$RUNS$s/cycle1/eval_sft"); done
rm -rf "$OUT/curve"
"$PYTHON" -m analysis.efficiency "${runs[@]}" --equivalent "$curve" --out "$OUT/curve"
[ -n "$SMALLEST" ] || "$PYTHON" benchmarks/figure.py efficiency "$OUT/curve" \
  --command "SEEDS=\"$SEEDS\" bash benchmarks/efficiency.sh"
