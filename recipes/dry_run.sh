# Sourced by cycle.sh if DRY_RUN is set: its stages are shown and their flags are read, but none is run.

# In place of cycle.sh's `run`. The script stops at the last flag, before it imports torch.
run() {
  local said
  shift
  echo "$*"
  said=$("$PYTHON" "$@" --no-such-flag 2>&1) || :
  [[ $said == *"unrecognized arguments: --no-such-flag;"* ]] || fail "${said##*$'\n'}"
}

# Files and flags are checked on the way; this is the rest.
for v in POLICY GENERATOR REWARD_BACKBONE; do
  # What is not there is a name on the Hub.
  [ ! -e "${!v}" ] || [ -f "${!v}/config.json" ] || fail "$v=${!v}: no config.json in it; give a model's folder"
done
[ -z "$LAUNCH" ] || command -v "${LAUNCH%% *}" > /dev/null || fail "LAUNCH: no command ${LAUNCH%% *}; install it"
place=$OUT
while [ ! -e "$place" ]; do place=$(dirname "$place"); done
free=$(df -Pk "$place" | awk 'NR == 2 {print int($4 * 1024 / 1e9)}')
[ "$free" -ge "$DISK_GB" ] || fail "OUT=$OUT: $free GB of disk are free and it needs $DISK_GB; make room"
[ -z "$PLANS" ] || "$PYTHON" benchmarks/memory.py --fits "$GPU_GB" --rows $PLANS || exit 2
# No stage is launched, and nothing is there to mark or to compare.
LAUNCH= CONTROLS= TRUTH=
