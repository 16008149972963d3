#!/usr/bin/env bash
# The library by clang, as `pip install ziglang` brings it:
#
#     tests/clang.sh here      the C tests, and whether results are bit for bit those of the library
#                              built in place
#     tests/clang.sh macos     for a Mac of Apple's processors, with a program: compiled and linked
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    here) target= ;;
    macos) target="-target aarch64-macos" ;;
    *) sed -n '2,7s/^# \?//p' "$0"; exit 2 ;;
esac
folder=build/clang-$1
trap "rm -f a.o" EXIT # which ziglang leaves wherever it links with -r
clang="${PYTHON:-python} -m ziglang cc $target"
CC=$clang FASTNORM_LEVELS=0 FASTNORM_CFLAGS=-O1 \
    "${PYTHON:-python}" setup.py -q install_c --prefix="$folder" --build-temp="$folder/objects"

# Of one of the tests, linked with a library. (Without -O ziglang adds a sanitizer, whose threads need
# more stack than the library promises to do with.)
program() {
    $clang -std=gnu99 -O1 "tests/$1.c" -Iinclude -L"$2" -lfastnorm -Wl,-rpath,"$PWD/$2" -lm -lpthread \
        -o "$folder/$1"
}
for test in test_library test_attack; do
    program $test "$folder/lib"
    [ "$1" = macos ] || "$folder/$test"
done | tee "$folder/answers"
[ "$1" = macos ] && echo "$1: compiled and linked" && exit
program test_attack fastnorm/lib
results() { sed -n 's/.*results //p'; }
[ "$("$folder/test_attack" | results)" = "$(results <"$folder/answers")" ] || {
    echo "not the same bits"
    exit 1
}
