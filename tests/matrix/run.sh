#!/usr/bin/env bash
# Runs the real-process tests with PostgreSQL's programs of several major versions, and prints a table of versions and
# checks in Markdown (docs/matrix.md).
#
#   tests/matrix/run.sh [13] [14] ...        (default: 13 to 18)
#
# Programs are fetched by tests/matrix/fetch.sh, whose head says from where. A check that fails is tried once more, since
# the tests measure times; what passes then is marked. A check that says "skipped:" does not apply to that version. Ends
# with 1 if a check failed twice.
#
# MATRIX_DIR     where programs and outputs are kept (default: /var/tmp/kornak-matrix)
# KORNAK_PYTHON  a Python with asyncpg and psycopg (default: one that is made in MATRIX_DIR)
# ONLY=words     only checks whose name contains one of these words
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export MATRIX_DIR=${MATRIX_DIR:-/var/tmp/kornak-matrix}
logs=$MATRIX_DIR/logs
mkdir -p "$logs"
cd "$here/../.."
[ $# -gt 0 ] || set -- 13 14 15 16 17 18

checks=(
  "bootstrap, copies, ten switchovers under load|switchover|ten_switchovers_under_load_cost_no_client_an_error"
  "crash of the leader under load|failover|a_killed_postmaster_costs_only_what_was_in_flight"
  "loss of the leader's host, its return|failover|a_lost_node_is_replaced_within_the_lease_and_returns_as_a_standby"
  "a diverged primary: pg_rewind, or a new copy|repair|a_diverged_primary_comes_back_by_rewind_or_as_a_new_copy"
  "synchronous mode: on, strict, quorum|replication|synchronous_modes_keep_their_word_while_standbys_come_and_go"
  "permanent slots and a cascade through a failover|replication|a_cascade_and_permanent_slots_survive_a_failover"
  "failover slots, synchronized_standby_slots|versions|failover_slots_are_there_after_a_switchover_and_a_crash"
  "standby cluster|standby_cluster|a_standby_cluster_follows_and_takes_over"
  "bootstrap to a point in time|repair|a_cluster_begins_at_a_point_in_time_of_a_backup"
  "restart with pending parameters, raised and lowered|versions|a_parameter_that_needs_a_restart_is_raised_and_lowered"
  "a running server is taken over|rest|a_running_server_is_taken_over_with_a_generated_file"
  "this release's libpq, asyncpg, psycopg through the proxy|versions|a_releases_own_libpq_works_through_the_proxy"
  "pgBackRest: copies, archive, point in time|backup_tools|pgbackrest_makes_copies_archives_through_a_switchover_and_restores"
  "a pooled listener|pooling|a_pool_in_front_of_a_server"
  "cancel requests|cancel|a_cancel_request_finds_its_query_through_any_proxy_and_hits_no_other"
)

selected() {
  local word
  [ -n "${ONLY:-}" ] || return 0
  for word in $ONLY; do case $1 in *"$word"*) return 0 ;; esac; done
  return 1
}

if [ -z "${KORNAK_PYTHON:-}" ]; then
  export KORNAK_PYTHON=$MATRIX_DIR/venv/bin/python
  if ! "$KORNAK_PYTHON" -c 'import asyncpg, psycopg' 2>/dev/null; then
    python3 -m venv "$MATRIX_DIR/venv"
    "$MATRIX_DIR/venv/bin/pip" install --quiet asyncpg 'psycopg[binary]' || unset KORNAK_PYTHON
  fi
fi

# The tests' programs, by the file that each is made of.
declare -A program
arguments=()
for line in "${checks[@]}"; do
  IFS="|" read -r label file _ <<<"$line"
  ! selected "$label" || arguments+=(--test "$file")
done
while IFS=$'\t' read -r name path; do program[$name]=$path; done < <(
  cargo test --locked --workspace "${arguments[@]}" --no-run --message-format=json 2>"$logs/build.log" |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and "test" in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"], sep="\t")'
)
[ ${#program[@]} -gt 0 ] || { tail -20 "$logs/build.log"; exit 1; }

# One check with the programs in $bin: its cell of the table.
check() {
  local major=$1 file=$2 name=$3 try log
  for try in 1 2; do
    log=$logs/$major-$name.$try.log
    if KORNAK_PG_BIN=$bin timeout 300 "${program[$file]}" --exact --nocapture "$name" >"$log" 2>&1; then
      if grep -q '^skipped:' "$log"; then echo "n/a"
      elif [ $try = 2 ]; then echo "ok (2nd)"
      else echo ok; fi
      return
    fi
  done
  echo "**failed**"
}

declare -A cell
versions=()
failed=0
for major in "$@"; do
  if bin=$("$here/fetch.sh" "$major"); then
    version=$("$bin/postgres" --version | grep -oE '[0-9]+(\.[0-9]+|[a-z]+[0-9]+)' | head -1)
  else
    bin='' version="$major (not fetched)"
  fi
  versions+=("$version")
  for line in "${checks[@]}"; do
    IFS='|' read -r label file name <<<"$line"
    selected "$label" || continue
    if [ -z "$bin" ]; then result='-'; else result=$(check "$major" "$file" "$name"); fi
    cell["$version|$label"]=$result
    printf '%s: %s: %s\n' "$version" "$label" "$result" >&2
    case $result in *failed*) failed=1 ;; esac
  done
done

echo "$(date +%F), $(git rev-parse --short HEAD 2>/dev/null || echo 'no commit'):"
echo
printf '| check |'; printf ' %s |' "${versions[@]}"; echo
printf '|---|'; printf -- '---|%.0s' "${versions[@]}"; echo
for line in "${checks[@]}"; do
  IFS='|' read -r label _ <<<"$line"
  selected "$label" || continue
  printf '| %s |' "$label"
  for version in "${versions[@]}"; do printf ' %s |' "${cell["$version|$label"]}"; done
  echo
done
exit $failed
