#!/usr/bin/env bash
# The C library under libFuzzer, which comes with clang:
#
#     tests/fuzz.sh SECONDS     from the inputs of tests/corpus.txt on; a crash is added to them
#     tests/fuzz.sh merge       those found since that reach code that none before did are added
#
# The corpus holds an input a line, in hexadecimal. tests/sanitize.sh address runs all of it again.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=build/fuzz program=build/fuzz/fuzz_library corpus=tests/corpus.txt
add() {  # the inputs in a folder
    for input in "$1"/*; do
        [ ! -f "$input" ] || { od -An -v -tx1 "$input" | tr -d ' \n'; echo; } >> "$corpus"
    done
}
[ "${1:-}" ] || { sed -n '2,5s/^# \?//p' "$0"; exit 2; }
mkdir -p "$folder/kept" "$folder/found" "$folder/crashes" "$folder/merged"
rm -f "$folder"/kept/* "$folder"/crashes/* "$folder"/merged/*
number=0
while read -r line; do
    number=$((number + 1))
    # shellcheck disable=SC2059
    printf "$(echo "$line" | sed 's/../\\x&/g')" > "$folder/kept/$number"
done < "$corpus"
if [ "$1" = merge ]; then
    cp "$folder"/kept/* "$folder/merged"
    "$program" -merge=1 -use_counters=0 "$folder/merged" "$folder/found"
    (cd "$folder/kept" && ls) | (cd "$folder/merged" && xargs rm -f)
    add "$folder/merged"
    exit
fi
command -v clang >/dev/null || { echo "clang is not installed: it brings libFuzzer"; exit 1; }
CC=clang FASTNORM_OPENMP=0 FASTNORM_CFLAGS="-O1 -g1 -fsanitize=fuzzer-no-link,address" \
    "${PYTHON:-python}" setup.py -q install_c --prefix="$folder" --build-temp="$folder/objects"
clang -std=gnu99 -O1 -g1 -fsanitize=fuzzer,address tests/fuzz_library.c -I"$folder/include" \
    "$folder/lib/libfastnorm.so" -Wl,-rpath,"$PWD/$folder/lib" -lm -o "$program"
trap 'add "$folder/crashes"' EXIT
"$program" -max_total_time="$1" -max_len=512 -len_control=0 -print_final_stats=1 \
    -artifact_prefix="$folder/crashes/" "$folder/found" "$folder/kept"
