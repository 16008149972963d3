#!/usr/bin/env bash
# The C tests on another kind of processor, cross-compiled and run by QEMU, and whether their results are
# bit for bit those of this one:
#
#     tests/emulate.sh aarch64     or riscv64, s390x (big-endian), powerpc64le
#
# It takes, as Debian names them, gcc-aarch64-linux-gnu and qemu-user-static, and the library of this
# processor, built in place.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:?which processor}
target=$kind-linux-gnu
emulator=qemu-${kind/powerpc/ppc}-static
folder=build/$kind
turns=100 # random shapes of test_attack, a third of what it takes by itself; here as many

results() { sed 's/.*results //' <<<"$1"; }

CC=$target-gcc "${PYTHON:-python}" setup.py -q install_c --prefix="$folder" --build-temp="$folder/objects"
for test in test_library test_attack; do
    $target-gcc -std=gnu99 "tests/$test.c" -I"$folder/include" "$folder/lib/libfastnorm.a" \
        -fopenmp -lm -lpthread -o "$folder/$test"
    answer=$("$emulator" -L "/usr/$target" "$folder/$test" $turns)
    echo "$kind, $test: $answer"
done

"${CC:-cc}" -std=gnu99 tests/test_attack.c -Iinclude fastnorm/lib/libfastnorm.so \
    -Wl,-rpath,"$PWD/fastnorm/lib" -lm -lpthread -o "$folder/test_attack_here"
here=$("$folder/test_attack_here" $turns)
echo "here, test_attack: $here"
[ "$(results "$answer")" = "$(results "$here")" ] || { echo "not the same bits"; exit 1; }
