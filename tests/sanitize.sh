#!/usr/bin/env bash
# The C tests under a sanitizer:
#
#     tests/sanitize.sh address     AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer, at
#                                   every level that this processor has; the fuzzer's corpus too.
#                                   With FASTNORM_LEVELS=0 at the highest alone
#     tests/sanitize.sh thread      ThreadSanitizer, threads from pthreads: gcc's knows no OpenMP
#     tests/sanitize.sh valgrind    memcheck, which knows the instructions of the compiler's baseline
#
# The last two compile a third of the kernels, for one level alone.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    # What null, object-size and pointer-overflow would find, AddressSanitizer finds at the access; its
    # checks as calls. That compiles in a fifth of the time.
    address) flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined
                    -fno-sanitize=null,object-size,pointer-overflow
                    --param asan-instrumentation-with-call-threshold=0"
             openmp=1 levels=${FASTNORM_LEVELS:-1}
             [ "$levels" = 1 ] || flags+=" -march=native" ;;
    # Threads for as small calls as OpenMP has them for.
    thread) flags="-fsanitize=thread -march=native -DFASTNORM_CREATE_BYTES=196608" openmp=0 levels=0 ;;
    valgrind) flags="" openmp=0 levels=0 ;;
    *) sed -n '2,10s/^# \?//p' "$0"; exit 2 ;;
esac
folder=build/$1
# A third of the time to compile, and the same kernels: their loops are inlined at any level. (With
# -g, where each variable lies is followed through them: twice the time.)
FASTNORM_LEVELS=$levels FASTNORM_OPENMP=$openmp FASTNORM_CFLAGS="-O1 -g1 -fno-omit-frame-pointer $flags" \
    "${PYTHON:-python}" setup.py -q install_c --prefix="$folder" --build-temp="$folder/objects"
# shellcheck disable=SC2086
for test in test_library test_attack; do
    "${CC:-cc}" -std=gnu99 -g $flags "tests/$test.c" -I"$folder/include" \
        "$folder/lib/libfastnorm.so" -Wl,-rpath,"$PWD/$folder/lib" -lm -lpthread -o "$folder/$test"
    if [ "$1" = valgrind ]; then
        # None of its random shapes: parts of vectors of float16 are converted with the lanes beside
        # them, which nothing set and nothing stores, by code that branches.
        [ $test = test_attack ] && turns=0 || turns=
        valgrind -q --error-exitcode=1 --leak-check=full "$folder/$test" $turns
        continue
    fi
    [ "$levels" = 1 ] && at="v2 v3 v4" || at=native
    for level in $at; do
        answer=$(FASTNORM_ISA=$level "$folder/$test")
        echo "$1, at most $level, $test: $answer"
    done
done
if [ "$1" = address ]; then
    # shellcheck disable=SC2086
    "${CC:-cc}" -std=gnu99 -O1 -g $flags -DSTANDALONE tests/fuzz_library.c -I"$folder/include" \
        "$folder/lib/libfastnorm.so" -Wl,-rpath,"$PWD/$folder/lib" -lm -o "$folder/fuzz_library"
    answer=$("$folder/fuzz_library" 40 tests/corpus.txt)
    echo "address, random inputs: $answer"
    answer=$(FASTNORM_LAST_LEVEL_BYTES=1 "$folder/fuzz_library" 20 tests/corpus.txt)
    echo "address, streamed past a cache of one byte: $answer"
fi
