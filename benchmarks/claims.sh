# Sourced by ablations.sh, efficiency.sh, large.sh and transfer.sh from the repository's root, with the names
# of the variables that their results depend on. Sets OUT and SEEDS. With SMALLEST, everything is as small as
# it can be, to see that the script works, and nothing is written outside of OUT.
NAME=$(basename "$0" .sh)
SMALLEST=${SMALLEST:-}
OUT=${OUT:-runs/$NAME${SMALLEST:+_smallest}}
SEEDS=${SEEDS:-0 1 2}
. ./setup.sh requirements.txt
export PYTHON

# A stage's folder is final once it exists, so a folder must hold only runs of the same settings.
settings=$(for v in SMALLEST "$@"; do echo "$v=${!v:-}"; done)
mkdir -p "$OUT"
[ -e "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
if [ "$settings" != "$(cat "$OUT/settings")" ]; then
  echo "$NAME.sh: $OUT holds runs with other settings ($OUT/settings); choose another OUT or remove it" >&2
  exit 2
fi

# stage FOLDER SEED ROOT COMMAND...: run the command with these image root and seed unless its folder exists.
stage() {
  local folder=$1 seed=$2 root=$3; shift 3
  [ -e "$folder" ] || "$PYTHON" "$@" --image-root "$root" --out "$folder" --seed "$seed"
}

# collect TABLE PART AGAINST FLAGS...: the result file and the table of the runs $OUT/seedN/PART.
collect() {
  local table=$1 part=$2 against=$3 s folders=(); shift 3
  for s in $SEEDS; do folders+=("$OUT/seed$s/$part"); done
  "$PYTHON" benchmarks/collect.py "$table" --runs "${folders[@]}" --against "$against" \
    --command "SEEDS=\"$SEEDS\" bash benchmarks/$NAME.sh" ${SMALLEST:+--print} "$@"
}
