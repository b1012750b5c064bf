# Sourced by transfer.sh and efficiency.sh, from the repository's root, once OUT and the settings named in $@
# are set. A stage's folder is final once it exists: a second call resumes the first, or does nothing.
. ./setup.sh requirements.txt

settings=$(for v in "$@"; do echo "$v=${!v}"; done)
mkdir -p "$OUT"
[ -e "$OUT/settings" ] || echo "$settings" > "$OUT/settings"
if [ "$settings" != "$(cat "$OUT/settings")" ]; then
  echo "$(basename "$0"): $OUT holds runs with other settings ($OUT/settings);" \
    "choose another OUT or remove it" >&2
  exit 2
fi

# stage FOLDER SEED COMMAND...: run the command unless its folder exists.
stage() {
  local folder=$1 seed=$2; shift 2
  [ -e "$folder" ] || "$PYTHON" "$@" --image-root "$OUT" --out "$folder" --seed "$seed"
}
