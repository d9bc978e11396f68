#!/usr/bin/env bash
# Builds the tests of the data core twice, for the address and undefined-behaviour sanitizers and for
# the thread sanitizer, and runs them; then fuzzes the reader of .idx files.
#
#   bash tests/sanitizers.sh [BUILD_DIR]
#
# Needs CMake, and g++ or (CXX=clang++) clang++, which brings libFuzzer along. Exit code 77: the
# machine cannot build for the sanitizers.
set -eu

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
compiler=${CXX:-g++}
fuzz_inputs=300000
fuzz_seconds=30

if ! command -v cmake >/dev/null; then
    echo "no cmake found" >&2
    exit 77
fi
for sanitizer in address undefined thread; do
    if ! echo 'int main() {}' | "$compiler" -fsanitize=$sanitizer -x c++ -o /dev/null - 2>/dev/null; then
        echo "$compiler cannot link with -fsanitize=$sanitizer" >&2
        exit 77
    fi
done

if [ $# -gt 0 ]; then
    build=$1
else
    build=$(mktemp -d)
    trap 'rm -rf -- "$build"' EXIT
fi

# libFuzzer's counters are for the build that fuzzes: to the thread sanitizer they are data races.
counters=
if "$compiler" --version | grep -q clang; then
    counters=,fuzzer-no-link
fi

# build NAME SANITIZERS
build() {
    cmake -S . -B "$build/$1" -D DATA_CORE_TESTS=ON -D CMAKE_CXX_COMPILER="$compiler" \
        -D CMAKE_BUILD_TYPE=None \
        -D CMAKE_CXX_FLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=$2 -fno-sanitize-recover=all" \
        >"$build/$1.log" 2>&1 &&
        cmake --build "$build/$1" --parallel "$(nproc)" >>"$build/$1.log" 2>&1 && return
    tail -n 40 -- "$build/$1.log" >&2
    return 1
}

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1

mkdir -p -- "$build"
echo "address and undefined:"
build address "address,undefined$counters"
"$build/address/tests/core/cpp/data_core_tests"

# The thread sanitizer cannot place its memory where a kernel randomises too many address bits.
echo "thread:"
build thread thread
without_randomisation=()
if setarch "$(uname -m)" -R true 2>/dev/null; then
    without_randomisation=(setarch "$(uname -m)" -R)
fi
"${without_randomisation[@]}" "$build/thread/tests/core/cpp/data_core_tests"

echo "fuzzing:"
if [ -n "$counters" ]; then
    "$build/address/tests/core/cpp/index_fuzz" -max_total_time=$fuzz_seconds -max_len=400
else
    "$build/address/tests/core/cpp/index_fuzz" $fuzz_inputs
fi
