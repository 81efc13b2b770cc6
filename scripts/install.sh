#!/usr/bin/env bash
# Installs what a bare Debian machine lacks to build and run Kornak; with --tests also what
# `make test` and `make bench` start, with --drivers what `make drivers` builds with, and with --clients
# what `make clients` runs. Safe to run again: nothing missing means nothing done.
#
# No service is started and no database cluster is created by it: the demo and the tests start
# their own servers on free ports, and a Debian default on 5432 or 2379 would be in their way.
set -euo pipefail

rust_wanted=1.95
tests=no
drivers=no
clients=no

usage() {
  cat <<TEXT
usage: scripts/install.sh [--tests] [--drivers] [--clients]

  --tests   also etcd, HAProxy, PgBouncer, curl, openssl, patchelf, ip and Python's venv (for Patroni itself, from PyPI),
            which the tests and benchmarks start
  --drivers what `make drivers` needs on top of it to build drivers written in C
  --clients languages and drivers of `make clients`, as far as this Debian has them

Needs root or sudo only if a package is missing. Rust $rust_wanted or newer is required as well; if there
is none it is installed by rustup, and rustup from https://rustup.rs, for the user who runs this.
TEXT
}

say() { printf 'install: %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

for argument in "$@"; do
  case $argument in
    --tests) tests=yes ;;
    --drivers) drivers=yes ;;
    --clients) clients=yes ;;
    -h | --help) usage; exit 0 ;;
    *) usage >&2; exit 2 ;;
  esac
done

# What counts is the file that is used, not the package that brought it: PostgreSQL may come from
# its own repository, protoc from anywhere.
has_command() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }
has_postgres() { compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || has_command postgres; }
# Patroni runs as the OS user of the servers, so it is Debian's Python that counts.
has_venv() { /usr/bin/python3 -c 'import ensurepip, venv' >/dev/null 2>&1; }
has_libpq() { [ -e "$(pg_config --includedir 2>/dev/null)/libpq-fe.h" ]; }
has_python_headers() {
  python3 -c 'import os, sysconfig as s; exit(not os.path.exists(s.get_path("include") + "/Python.h"))' 2>/dev/null
}
has_protos() { [ -e /usr/include/google/protobuf/empty.proto ] || [ -n "${PROTOC_INCLUDE:-}" ]; }

missing=()
need() { local package=$1; shift; "$@" || missing+=("$package"); }

list_missing() {
  missing=()
  need build-essential has_command cc
  need protobuf-compiler has_command protoc
  need libprotobuf-dev has_protos
  need postgresql-15 has_postgres
  need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt
  if [ "$tests" = yes ]; then
    need etcd-server has_command etcd
    need etcd-client has_command etcdctl
    need curl has_command curl
    need haproxy has_command haproxy
    need iproute2 has_command ip
    need openssl has_command openssl
    need patchelf has_command patchelf
    need pgbouncer has_command pgbouncer
    need python3-venv has_venv
  fi
  if [ "$drivers" = yes ]; then
    need libpq-dev has_libpq
    need python3-dev has_python_headers
  fi
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

policy=/usr/sbin/policy-rc.d
policy_is_ours=no
createcluster=/etc/postgresql-common/createcluster.conf
createcluster_is_changed=no

restore() {
  [ "$policy_is_ours" = no ] || as_root rm -f "$policy"
  [ "$createcluster_is_changed" = no ] || as_root sed -i '/^create_main_cluster = false # kornak$/d' "$createcluster"
}

# Services of packages installed now must neither start now nor at the next boot.
quiet_services() {
  command -v systemctl >/dev/null 2>&1 || return 0
  local package unit
  for package in "${missing[@]}"; do
    case $package in
      etcd-server) unit=etcd ;;
      haproxy | pgbouncer) unit=$package ;;
      *) continue ;;
    esac
    as_root systemctl disable --quiet "$unit.service" 2>/dev/null || true
    say "$unit.service stays disabled; 'systemctl enable --now $unit' turns it on"
  done
}

apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }

install_packages() {
  command -v apt-get >/dev/null 2>&1 ||
    fail "missing: ${missing[*]}; this is not Debian, install their equivalents and run this again"
  [ "$(id -u)" -eq 0 ] || command -v sudo >/dev/null 2>&1 ||
    fail "missing: ${missing[*]}; run this as root, or install sudo"
  say "installing ${missing[*]}"
  trap restore EXIT
  if [ ! -e "$policy" ]; then
    policy_is_ours=yes
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
  fi
  apt update
  local packages=("${missing[@]}") index
  for index in "${!packages[@]}"; do
    # Debian 13 has 17: any supported release will do where 15 is not to be had.
    if [ "${packages[index]}" = postgresql-15 ]; then
      apt-cache show postgresql-15 >/dev/null 2>&1 || packages[index]=postgresql
      apt install --no-install-recommends postgresql-common
      createcluster_is_changed=yes
      echo 'create_main_cluster = false # kornak' | as_root tee -a "$createcluster" >/dev/null
    fi
  done
  apt install --no-install-recommends "${packages[@]}"
  quiet_services
  list_missing
  [ ${#missing[@]} -eq 0 ] || fail "still missing after the installation: ${missing[*]}"
}

list_missing
if [ ${#missing[@]} -gt 0 ]; then install_packages; fi

PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
# What `make clients` cannot run for want of a package it leaves out, and says so; so this fails nothing.
client_stacks() {
  local wanted=() package
  for package in default-jdk-headless golang-github-jackc-pgx-v4-dev golang-github-lib-pq-dev golang-go \
    libdbd-pg-perl libhikaricp-java libpostgresql-jdbc-java npm odbc-postgresql php-cli php-pgsql \
    python3-venv ruby ruby-activerecord ruby-pg unixodbc odbcinst; do
    case $package in
      npm) if has_command npm; then continue; fi ;;
      default-jdk-headless) if has_command javac; then continue; fi ;;
    esac
    dpkg -s "$package" 2>/dev/null | grep -q '^Status: install ok installed' || wanted+=("$package")
  done
  [ ${#wanted[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null 2>&1 || { say "not Debian: install the equivalents of ${wanted[*]}"; return 0; }
  say "installing ${wanted[*]}"
  apt update || true
  for package in "${wanted[@]}"; do
    apt install --no-install-recommends "$package" || say "SKIPPED $package: it cannot be had here"
  done
}
if [ "$clients" = yes ]; then client_stacks; fi

rust_is_new_enough() {
  local have
  have=$(rustc --version 2>/dev/null | sed -E 's/^rustc ([0-9]+\.[0-9]+).*/\1/') || return 1
  [ -n "$have" ] && printf '%s\n%s\n' "$rust_wanted" "$have" | sort -C -V
}
# Debian 12 has neither a rustup nor a Rust that is new enough.
install_rustup() {
  local home=${CARGO_HOME:-${HOME:-/root}/.cargo}
  if ! command -v curl >/dev/null 2>&1; then
    say "installing curl"
    apt update && apt install --no-install-recommends curl ca-certificates
  fi
  say "installing rustup into $home; 'rustup self uninstall' takes it away again"
  # The toolchain comes below, as for a rustup that is there already.
  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
    sh -s -- -y --quiet --default-toolchain none --no-modify-path && [ -x "$home/bin/rustup" ] ||
    fail "Rust $rust_wanted or newer is required and was not found, and rustup could not be installed.
  Get one of them, from https://rustup.rs or Debian 13's package (apt-get install rustup), and run this again."
}

if ! rust_is_new_enough || ! command -v cargo >/dev/null 2>&1; then
  command -v rustup >/dev/null 2>&1 || install_rustup
  say "installing the Rust toolchain through rustup"
  rustup toolchain install stable --profile minimal --component clippy --component rustfmt
  rustup default stable
  rust_is_new_enough || fail "rustup's stable toolchain is older than Rust $rust_wanted"
fi
if [ "$tests" = yes ]; then
  for component in clippy rustfmt; do
    command -v "cargo-${component/rustfmt/fmt}" >/dev/null 2>&1 || rustup component add "$component"
  done
fi
say "nothing missing"
