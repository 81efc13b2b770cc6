#!/usr/bin/env bash
# Builds what tests/clients runs, into $1 (default: target/clients): packages of npm and PyPI, Java and Go
# with Debian's libraries. What cannot be had here is said aloud and left out: GROUP.skipped has the reason.
#
#   tests/clients/setup.sh [DIRECTORY]
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:-$here/../../target/clients}"
built=$(cd "${1:-$here/../../target/clients}" && pwd)
rm -f "$built"/*.skipped
cd "$built"

# group GROUP... -- what a failure of the next command means
skip() {
  local reason=$1 group
  shift
  for group in "$@"; do
    echo "$reason" > "$built/$group.skipped"
    echo "clients: SKIPPED $group: $reason"
  done
}

python_packages='psycopg[binary,pool] psycopg2-binary asyncpg pg8000 sqlalchemy greenlet django pyodbc'
if [ ! -e venv/ready ]; then
  # shellcheck disable=SC2086
  if python3 -m venv venv && venv/bin/pip -q install --disable-pip-version-check $python_packages; then
    touch venv/ready
  else
    skip "PyPI's packages could not be installed" python-1 python-2 odbc
  fi
fi
odbcinst -q -d 2>/dev/null | grep -q 'PostgreSQL Unicode' || skip 'no psqlodbc (Debian: odbc-postgresql)' odbc

node_packages='pg pg-cursor pg-copy-streams postgres knex sequelize drizzle-orm kysely typeorm reflect-metadata'
if ! command -v npm >/dev/null; then
  skip 'no npm' node-1 node-2
elif [ ! -e node/ready ]; then
  mkdir -p node
  # shellcheck disable=SC2086
  if (cd node && echo '{"private": true}' > package.json && npm install --silent --no-audit --no-fund $node_packages); then
    touch node/ready
  else
    skip "npm's packages could not be installed" node-1 node-2
  fi
fi

jars=/usr/share/java
if ! command -v javac >/dev/null || [ ! -e $jars/postgresql.jar ] || [ ! -e $jars/HikariCP.jar ]; then
  skip 'no javac, pgjdbc or HikariCP (Debian: default-jdk-headless, libpostgresql-jdbc-java, libhikaricp-java)' java-1 java-2
elif ! javac -d java -cp $jars/postgresql.jar:$jars/HikariCP.jar "$here/java/WithPgjdbc.java"; then
  skip 'the program was not compiled' java-1 java-2
fi

# Debian's packages of Go modules lie in a GOPATH.
gopath=/usr/share/gocode
if ! command -v go >/dev/null || [ ! -d $gopath/src/github.com/lib/pq ] || [ ! -d $gopath/src/github.com/jackc/pgx/v4 ]; then
  skip 'no go, lib/pq or pgx (Debian: golang-go, golang-github-lib-pq-dev, golang-github-jackc-pgx-v4-dev)' go
else
  mkdir -p go/path && ln -sfn "$here/go" go/path/src
  for program in with_pq with_pgx; do
    GO111MODULE=off GOFLAGS= GOPATH=$built/go/path:$gopath go build -o "go/$program" "$program" || skip "$program was not compiled" go
  done
fi

php -r 'exit(extension_loaded("pdo_pgsql") ? 0 : 1);' 2>/dev/null || skip 'no PHP with pgsql (Debian: php-cli, php-pgsql)' php
ruby -e 'require "pg"; require "active_record"' 2>/dev/null || skip 'no Ruby with pg and ActiveRecord (Debian: ruby, ruby-pg, ruby-activerecord)' ruby
perl -MDBD::Pg -e 1 2>/dev/null || skip 'no DBD::Pg (Debian: libdbd-pg-perl)' perl
echo "clients: built in $built"
