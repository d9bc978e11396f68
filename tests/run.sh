#!/usr/bin/env bash
# Sets itself up and runs the tests; the last line and the exit code are pytest's.
set -u

suites=(slow faults peers browser schedulers gpu)

usage() {
    cat <<'TEXT'
usage: bash tests/run.sh [SUITE-FLAG ...] [--] [PYTEST-ARGUMENT ...]

Runs every quick test that needs no GPU. Each flag adds a suite:
  --slow         minutes rather than seconds: longer trainings, fresh installations
  --faults       killed processes, damaged files, full disks
  --peers        comparisons with other packages (Megatron-LM, transformers), which it installs
  --browser      the report in a real browser
  --schedulers   the cluster scripts under a real Slurm and Grid Engine (as root)
  --gpu          needs CUDA
  --all          all of them

Three files run at a time (pytest-xdist; -n 0 for one). What follows goes to pytest, for example
`bash tests/run.sh tests/data -k masking`; put -- before a first argument that starts with --.
TEXT
}

wanted=()
while [ $# -gt 0 ]; do
    case $1 in
        --slow | --faults | --peers | --browser | --schedulers | --gpu) wanted+=("${1#--}") ;;
        --all) wanted=("${suites[@]}") ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        --*)
            printf 'error: unknown flag %s\n\n' "$1" >&2
            usage >&2
            exit 2
            ;;
        *) break ;;
    esac
    shift
done

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/bootstrap.sh
. tools/bootstrap.sh
extras=(dev examples)
[[ " ${wanted[*]} " != *" peers "* ]] || extras+=(peers words)
bootstrap "${extras[@]}" || exit 1
if [[ " ${wanted[*]} " == *" peers "* ]]; then
    "$python" tests/huggingface/releases.py || exit 1
fi

left_out=()
for suite in "${suites[@]}"; do
    if [[ " ${wanted[*]} " != *" $suite "* ]]; then
        left_out+=("not $suite")
    elif ! grep --recursive --quiet --include='*.py' "mark\.$suite\b" tests; then
        echo "The suite '$suite' has no test yet."
    fi
done
selection=$(printf ' and %s' "${left_out[@]}")

# Three files at a time on two cores: a distributed test mostly waits for processes to start, meet and end.
exec "$python" -m pytest --numprocesses=3 --dist=loadfile ${left_out[0]:+-m "${selection# and }"} "$@"
