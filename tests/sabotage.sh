#!/bin/bash
# Breaks the proxy in each way that proxy/src/sabotage.rs knows, and sees whether the conversations of many clients
# tell. Needs `cargo build -p kornak-ctl` and the test's binary: tests/sabotage.sh target/debug/deps/differential-… [NAME…]
test=$(realpath "${1:?the binary of tests/tests/differential.rs}"); shift
cd "$(dirname "$0")" || exit 2
names=("$@")
[ ${#names[@]} -gt 0 ] || mapfile -t names < <(sed -nE '/^pub enum/,/^}/s/^    ([A-Z][A-Za-z]+),$/\1/p' ../proxy/src/sabotage.rs)
export KORNAK_DIFFERENTIAL_CONVERSATIONS=${KORNAK_DIFFERENTIAL_CONVERSATIONS:-1000} KORNAK_DIFFERENTIAL_SHRINK=0
missed=0
for name in "${names[@]}"; do
  if KORNAK_SABOTAGE=$name "$test" --nocapture many_clients >/tmp/kornak-sabotage.$$ 2>&1; then
    missed=$((missed + 1)); echo "$name: not found"
  else
    echo "$name: $(grep -m1 -oE '(pooled|plain|always), round [0-9]+' /tmp/kornak-sabotage.$$ || echo failed otherwise)"
  fi
done
rm -f /tmp/kornak-sabotage.$$
echo "$missed of ${#names[@]} were not found"
[ $missed = 0 ]
