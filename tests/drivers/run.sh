#!/usr/bin/env bash
# Runs drivers' own test suites against a server directly and through the proxy, and shows the
# difference: whatever passes directly has to pass through the proxy.
#
#   tests/drivers/run.sh [--pooled] [psycopg2] [asyncpg] [pg8000] [tokio-postgres]      (default: all)
#
# --pooled: through a listener with pool_mode: transaction, for which pooled-exceptions.txt says what
# needs a session by nature.
#
# Fetches each suite from its public registry (source distributions of PyPI, the crate), starts one
# server and one proxy, runs each suite against both, and prints a table. Ends with 1 if a test
# passes directly and not through the proxy, and exceptions.txt beside this file does not name it.
# A suite with such a test runs once more through the proxy, because the suites measure times; what
# passed in one of the two runs has passed.
#
# KORNAK_BIN   the binary to test (default: target/debug/kornak)
# KEEP=1       leave the directory with all outputs
# REPEAT=n     run each suite n times on each side; only what always passes directly counts
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
kornak=$(realpath -m "${KORNAK_BIN:-$root/target/debug/kornak}")
bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
export PATH="$bin:$PATH"
password=pw
pool= exceptions=$here/exceptions.txt
if [ "${1:-}" = --pooled ]; then
  shift
  pool=', pool_mode: transaction, pool_size: 20' exceptions=$here/pooled-exceptions.txt
fi
[ -x "$kornak" ] || { echo "no $kornak: build it with cargo build --workspace --bin kornak"; exit 1; }
[ $# -gt 0 ] || set -- psycopg2 asyncpg pg8000 tokio-postgres

work=$(mktemp -d "${TMPDIR:-/tmp}/kornak-drivers-XXXXXX")
chmod 755 "$work"
as_server() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
proxy_pid=
cleanup() {
  [ -z "$proxy_pid" ] || kill "$proxy_pid" 2>/dev/null || true
  as_server "$bin/pg_ctl" -D "$work/pg/data" -m immediate stop >/dev/null 2>&1 || true
  if [ -n "${KEEP:-}" ]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap cleanup EXIT
cd "$work"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
direct=$(free_port) proxied=$(free_port)

openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost \
  -addext basicConstraints=critical,CA:FALSE -keyout server.key -out server.crt 2>/dev/null
mkdir pg && echo "$password" > pg/pw
cp server.key server.crt pg/
[ "$(id -u)" != 0 ] || chown -R postgres pg
as_server chmod 600 "$work/pg/server.key"
as_server "$bin/initdb" -D "$work/pg/data" -U postgres -A scram-sha-256 --pwfile="$work/pg/pw" -N \
  --no-locale -E UTF8 >/dev/null
cat >> pg/data/postgresql.conf <<CONF
port = $direct
listen_addresses = '127.0.0.1'
unix_socket_directories = '$work/pg'
ssl = on
ssl_cert_file = '$work/pg/server.crt'
ssl_key_file = '$work/pg/server.key'
fsync = off
max_connections = 200
max_prepared_transactions = 10
wal_level = logical
CONF
# The roles of tokio-postgres's suite, each with a method of its own.
cat > pg/data/pg_hba.conf <<CONF
host all pass_user all password
host all md5_user all md5
host all scram_user all scram-sha-256
hostssl all ssl_user all trust
host all ssl_user all reject
host all all all scram-sha-256
host replication all all scram-sha-256
local all all trust
CONF
as_server "$bin/pg_ctl" -D "$work/pg/data" -l "$work/pg/log" -w start >/dev/null
export PGPASSWORD=$password PGUSER=postgres PGHOST=127.0.0.1
sql() { psql -X -q -v ON_ERROR_STOP=1 -p "$direct" -d postgres "$@"; }
sql -c "SET password_encryption = md5" -c "CREATE ROLE md5_user LOGIN PASSWORD 'password'" \
  -c "SET password_encryption = 'scram-sha-256'" -c "CREATE ROLE pass_user LOGIN PASSWORD 'password'" \
  -c "CREATE ROLE scram_user LOGIN PASSWORD 'password'" -c "CREATE ROLE ssl_user LOGIN" \
  -c "CREATE EXTENSION hstore" -c "CREATE EXTENSION citext" -c "CREATE EXTENSION ltree"

cat > proxy.yml <<YAML
scope: drivers
static: {members: [{name: a, host: 127.0.0.1, port: $direct}]}
proxy:
  listeners:
    - {name: primary, listen: "127.0.0.1:$proxied", target: primary$pool}
  status: false
  tls:
    client: {cert: server.crt, key: server.key}
  auth:
    user: postgres
    password: $password
    rules:
      - {user: pass_user, method: relay}
      - {user: md5_user, method: md5}
      - {user: ssl_user, type: hostssl, method: trust}
      - {user: ssl_user, method: reject}
      - {user: postgres, method: scram}
      - {method: scram}
YAML
"$kornak" check proxy.yml >/dev/null || "$kornak" check proxy.yml
"$kornak" proxy proxy.yml > proxy.log 2>&1 &
proxy_pid=$!
for attempt in $(seq 101); do
  psql -X -p "$proxied" -d postgres -qc 'SELECT 1' >/dev/null 2>&1 && break
  [ "$attempt" -le 100 ] || { echo "the proxy did not start:"; cat proxy.log; exit 1; }
  sleep 0.1
done

python3 -m venv venv
venv/bin/pip -q install --disable-pip-version-check pytest

# The source distribution of a package, unpacked into src-PACKAGE.
fetch() {
  venv/bin/pip -q download --disable-pip-version-check --no-deps --no-binary "$1" -d sdist "$1" >&2
  mkdir -p "src-$1" && tar -xf sdist/"${1//-/[-_]}"-*.tar.gz -C "src-$1" --strip-components 1
}

# Each suite is run on a port, and prints a line "PASSED name" or "FAILED name" a test.
lines() {
  awk '$1 ~ /^(PASSED|FAILED|ERROR)$/ { print $1, $2 }' | sort -u
}

psycopg2() {
  [ -d src-psycopg2 ] || { fetch psycopg2; venv/bin/pip -q install --disable-pip-version-check ./src-psycopg2 pytest-timeout >&2; mkdir run-psycopg2; mv src-psycopg2/tests run-psycopg2/tests; }
  sql -c 'DROP DATABASE IF EXISTS psycopg2_test WITH (FORCE)' -c 'CREATE DATABASE psycopg2_test'
  psql -X -q -p "$direct" -d psycopg2_test -c 'CREATE EXTENSION hstore'
  (cd run-psycopg2 && PSYCOPG2_TESTDB=psycopg2_test PSYCOPG2_TESTDB_HOST=127.0.0.1 \
    PSYCOPG2_TESTDB_PORT=$1 PSYCOPG2_TESTDB_USER=postgres PSYCOPG2_TESTDB_PASSWORD=$password \
    PSYCOPG2_TEST_REPL_DSN='user=postgres' PSYCOPG2_TEST_FAST=1 \
    ../venv/bin/python -m pytest -q -rA -p no:cacheprovider --tb=short --timeout 60 tests)
}

asyncpg() {
  [ -d src-asyncpg ] || { fetch asyncpg; venv/bin/pip -q install --disable-pip-version-check asyncpg pytest-timeout distro uvloop >&2; mkdir run-asyncpg; mv src-asyncpg/tests run-asyncpg/tests; }
  sql -c 'DROP DATABASE IF EXISTS asyncpg_test WITH (FORCE)' -c 'CREATE DATABASE asyncpg_test'
  # With PGHOST the suite takes the server there; tests that start servers of their own, or read the
  # server's log, skip themselves.
  (cd run-asyncpg && PGPORT=$1 PGDATABASE=asyncpg_test USE_UVLOOP=0 \
    ../venv/bin/python -m pytest -q -rA -p no:cacheprovider --tb=short --timeout 60 tests \
    --ignore tests/test__sourcecode.py)
}

pg8000() {
  [ -d src-pg8000 ] || { fetch pg8000; venv/bin/pip -q install --disable-pip-version-check ./src-pg8000 pytest-timeout pytest-mock pytest-benchmark pytz >&2; mkdir run-pg8000; mv src-pg8000/test src-pg8000/README.md run-pg8000/; }
  # auth/: one folder a method; those for md5, cleartext and GSS expect the server to ask for just that.
  (cd run-pg8000 && PGPORT=$1 ../venv/bin/python -m pytest -q -rA -p no:cacheprovider --tb=short \
    --timeout 60 --benchmark-disable --import-mode importlib --ignore-glob '*/test_gss.py' --ignore-glob '*/test_md5*.py' \
    --ignore-glob '*/test_password.py' test)
}

# Its tests name their address; the copy names ours, and a password for postgres.
tokio-postgres() {
  [ -d run-tokio ] || {
    mkdir fetch && (cd fetch && cargo init -q --bin --vcs none --name fetch . && cargo add -q tokio-postgres \
      && cargo vendor -q --versioned-dirs ../vendor) >&2
    cp -r vendor/tokio-postgres-0* run-tokio
    rm -f run-tokio/.cargo-checksum.json run-tokio/Cargo.toml.orig
    find run-tokio/tests -name '*.rs' -exec sed -i -E "s/user=postgres/user=postgres password=$password/g; s#/var/run/postgresql#$work/pg#" {} +
    find run-tokio/tests -name '*.rs' -exec sed -i 's/5433/@PORT@/g' {} +
    cp -r run-tokio/tests run-tokio/tests.in
  }
  rm -rf run-tokio/tests && cp -r run-tokio/tests.in run-tokio/tests
  find run-tokio/tests -name '*.rs' -exec sed -i "s/@PORT@/$1/g" {} +
  # "parse" has its expectations with the port; it starts nothing.
  (cd run-tokio && env -u PGHOST -u PGUSER -u PGPASSWORD CARGO_TARGET_DIR="$work/target" RUST_BACKTRACE=0 \
    cargo test --quiet --test test --features with-serde_json-1,with-uuid-1,array-impls \
    -- --format pretty --test-threads 4 --color never --skip parse) |
    tee tokio.raw | sed -nE 's/^test (\S+) \.\.\. ok$/PASSED \1/p; s/^test (\S+) \.\.\. FAILED$/FAILED \1/p'
}

# run SUITE PORT SIDE: always passed → SUITE.SIDE
run() {
  local n
  : > "$1.$3.raw"
  for n in $(seq "${REPEAT:-1}"); do
    "$1" "$2" > "$1.$3.out" 2>> "$1.$3.err" || true
    cat "$1.$3.out" >> "$1.$3.raw"
  done
  lines < "$1.$3.raw" > "$1.$3.lines"
  comm -23 <(sed -n 's/^PASSED //p' "$1.$3.lines" | sort -u) \
    <(sed -nE 's/^(FAILED|ERROR) //p' "$1.$3.lines" | sort -u) > "$1.$3"
}

bad=0
printf '%-16s %16s %16s %14s\n' suite 'passed directly' 'passed proxied' 'directly only'
for suite in "$@"; do
  run "$suite" "$direct" direct
  run "$suite" "$proxied" proxied
  comm -23 "$suite.direct" "$suite.proxied" > "$suite.only"
  if [ -s "$suite.only" ]; then
    mv "$suite.proxied" "$suite.first"
    run "$suite" "$proxied" proxied
    sort -u "$suite.first" "$suite.proxied" > either && mv either "$suite.proxied"
    comm -23 "$suite.direct" "$suite.proxied" > "$suite.only"
  fi
  count() { wc -l < "$1" | tr -d ' '; }
  printf '%-16s %16s %16s %14s\n' "$suite" "$(count "$suite.direct")" "$(count "$suite.proxied")" "$(count "$suite.only")"
  grep -vxFf <(sed -n "s/^$suite //p" "$exceptions" | sed 's/ *#.*//') "$suite.only" \
    > "$suite.bad" || true
  sed 's/^/    passes directly only: /' "$suite.bad"
  [ ! -s "$suite.bad" ] || bad=1
  [ -s "$suite.direct" ] || { echo "    nothing of $suite passed directly: the suite did not run"; tail -5 "$suite.direct.err"; bad=1; }
done
exit $bad
