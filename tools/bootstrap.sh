# shellcheck shell=bash
# Sourced by the scripts that set themselves up (tests/run.sh, examples/quickstart.sh, .ci/run):
#
#   . tools/bootstrap.sh
#   bootstrap EXTRA... || exit 1     # then $python is the environment's interpreter
#   make_environment DIR             # a new, empty virtual environment
#
# The environment is the active one, else .venv in the checkout. Nothing is installed, and no
# network is needed, while the stamp in the environment says that what is there is up to date.

bootstrap_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

# An interpreter's version, then what it lacks, named by the suffix of Debian's package for it.
# Runs on any Python 3, or a too old one could not say so.
bootstrap_probe='
import sys, os
answer = ["%d.%d.%d" % sys.version_info[:3]]
if sys.version_info < (3, 11):
    answer.append("old")
else:
    import importlib.util, sysconfig
    if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))) and sys.prefix == sys.base_prefix:
        answer.append("venv")
    if not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")):
        answer.append("dev")
print(*answer)
'

bootstrap_fail() {
    printf 'error: %s\n' "$1" >&2
    return 1
}

# bootstrap_packages VERSION "SUFFIX ...": Debian's names, e.g. "python3.11-venv python3.11-dev".
bootstrap_packages() {
    local suffixes=" $2"
    printf '%s' "${suffixes// / python${1%.*}-}"
}

# Prints a Python that can make an environment and build against its own headers.
find_python() {
    local candidate answer version lacks incomplete="" old=""
    for candidate in python3 python3.13 python3.12 python3.11; do
        answer=$("$candidate" -c "$bootstrap_probe" 2>/dev/null) || continue
        read -r version lacks <<<"$answer"
        case $lacks in
            "") command -v "$candidate" && return ;;
            old) old=${old:-"the newest found is $candidate, version $version"} ;;
            *) incomplete=${incomplete:-"$candidate (version $version) cannot build the package; install what it lacks: apt-get install$(bootstrap_packages "$version" "$lacks")"} ;;
        esac
    done
    bootstrap_fail "${incomplete:-Python 3.11 or newer is needed: ${old:-none was found}; install one, for example: apt-get install python3.11 python3.11-venv python3.11-dev}"
}

# make_environment DIR: whatever is there is removed.
make_environment() {
    local base log
    base=$(find_python) || return
    log=$("$base" -m venv --clear -- "$1" 2>&1) && return
    printf '%s\n' "$log" >&2
    bootstrap_fail "$base could not make the virtual environment $1"
}

bootstrap_check_headers() {
    local answer version lacks
    answer=$("$1" -c "$bootstrap_probe") || return
    read -r version lacks <<<"$answer"
    case $lacks in
        "") ;;
        old) bootstrap_fail "Python 3.11 or newer is needed, and $1 is $version; deactivate its environment, or activate one of a newer Python" ;;
        *) bootstrap_fail "$1 (version $version) lacks Python's headers; install them: apt-get install$(bootstrap_packages "$version" "$lacks")" ;;
    esac
}

bootstrap_check_compiler() {
    local candidate
    local -a compiler
    read -ra compiler <<<"${CXX:-}"
    for candidate in c++ g++ clang++; do
        [ "${#compiler[@]}" -eq 0 ] && command -v "$candidate" >/dev/null && compiler=("$candidate")
    done
    if [ "${#compiler[@]}" -eq 0 ]; then
        bootstrap_fail "a C++20 compiler is needed and none was found; install one: apt-get install g++"
    elif ! printf '#include <concepts>\n#include <span>\n' |
        "${compiler[@]}" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
        bootstrap_fail "${compiler[*]} cannot compile C++20; install g++ 11 or newer (apt-get install g++), or name another compiler in CXX"
    fi
}

# bootstrap_check_space DIR MEGABYTES: without that space pip would fail half-way, minutes later.
bootstrap_check_space() {
    local free
    free=$(df -Pm -- "$1" 2>/dev/null | sed -n '2s/^[^ ]* *[0-9]* *[0-9]* *\([0-9]*\).*/\1/p')
    [ -z "$free" ] || [ "$free" -ge "$2" ] ||
        bootstrap_fail "the environment $1 needs about $2 MB (several GB where PyTorch brings CUDA along), and its disk has $free MB free: make room, or activate an environment on another disk"
}

# The build tools that the machine lacks; a distribution's own are good enough.
bootstrap_build_tools() {
    local version
    version=$(cmake --version 2>/dev/null | sed -n 's/^cmake version //p')
    [ -n "$version" ] && printf '%s\n' 3.21 "$version" | sort --check=quiet --version-sort || echo cmake
    command -v ninja >/dev/null || echo ninja
}

# The tested set, without torch if the user's own environment has a usable one: a CUDA build of
# another version is kept.
bootstrap_constraints() {
    local environment=$1
    if [ "$environment" != "$bootstrap_root/.venv" ] && "$environment/bin/python" -c '
import sys
from importlib.metadata import version
sys.exit(tuple(map(int, version("torch").split(".")[:2])) < (2, 11))' 2>/dev/null; then
        grep -v '^torch==' constraints.txt
    else
        cat constraints.txt
    fi
}

# What an installation depends on. The checkout's path is part of it: an editable installation
# points there, and two checkouts may share an environment.
bootstrap_fingerprint() {
    {
        pwd -P
        "$1" -VV
        sha256sum pyproject.toml constraints.txt CMakeLists.txt csrc/*
    } | sha256sum | cut -d ' ' -f 1
}

# Copies pip's output from input to output, and announces each phase that takes long in a line.
bootstrap_phases() {
    local line phase told=""
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in
            Collecting* | *Downloading*) phase="fetching packages, PyTorch the largest of them" ;;
            *"Building editable for megatron-bert"*) phase="compiling the C++ core" ;;
            "Installing collected packages"*) phase="unpacking what was fetched" ;;
            *) continue ;;
        esac
        [ "$phase" = "$told" ] || printf '  %s ...\n' "$phase" >&2
        told=$phase
    done
}

# bootstrap_pip ENVIRONMENT EXTRAS LOG: the build runs in the environment itself, so that pinned tools
# build, a changed source is rebuilt without a network, and CMake's cache holds from build to build.
# Python compiles what it imports, unless it may not write bytecode; compiling every package
# completely takes longer than installing it.
bootstrap_pip() {
    local environment=$1 extras=$2 log=$3 constraints=$1/megatron-bert-constraints.txt
    local -a tools pip compiling=()
    mapfile -t tools < <(bootstrap_build_tools)
    bootstrap_constraints "$environment" >"$constraints" || return
    [ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || compiling=(--no-compile)
    pip=("$environment/bin/python" -m pip --disable-pip-version-check install --no-input
        "${compiling[@]}" --progress-bar off --constraint "$constraints")
    printf '  fetching what builds the package ...\n' >&2
    "${pip[@]}" scikit-build-core pybind11 "${tools[@]}" >"$log" 2>&1 || return
    SKBUILD_BUILD_DIR="$environment/data-core-build" \
        "${pip[@]}" --no-build-isolation --editable ".[$extras]" 2>&1 | bootstrap_phases >>"$log"
    return "${PIPESTATUS[0]}"
}

# bootstrap_install ENVIRONMENT EXTRA...
bootstrap_install() {
    local environment=$1 fingerprint recorded="" had="" extras
    local stamp=$environment/megatron-bert.stamp log=$environment/megatron-bert-install.log
    shift
    fingerprint=$(bootstrap_fingerprint "$environment/bin/python") || return
    [ -f "$stamp" ] && read -r recorded had <"$stamp"
    # shellcheck disable=SC2086 # one extra a word
    extras=$(printf '%s\n' ${had//,/ } "$@" | sort -u | paste -sd ,)
    [ "$recorded $had" = "$fingerprint $extras" ] && return

    bootstrap_check_headers "$environment/bin/python" || return
    bootstrap_check_compiler || return
    [ -n "$recorded" ] || bootstrap_check_space "$environment" 1500 || return
    printf 'Installing megatron-bert[%s] into %s: this takes some minutes ...\n' "$extras" "$environment" >&2
    rm -f -- "$stamp"
    if ! bootstrap_pip "$environment" "$extras" "$log"; then
        grep -v '^Requirement already satisfied' -- "$log" | tail -n 60 >&2
        bootstrap_fail "the installation into $environment failed; the account above is the end of $log"
        return
    fi
    printf '%s %s\n' "$fingerprint" "$extras" >"$stamp.new" && mv -- "$stamp.new" "$stamp"
}

# bootstrap EXTRA...
bootstrap() {
    local environment=${VIRTUAL_ENV:-}
    if [ -z "$environment" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        environment=${CONDA_PREFIX:-}
    fi
    if [ -n "$environment" ] && ! [ -x "$environment/bin/python" ]; then
        bootstrap_fail "the active environment $environment has no bin/python; deactivate it"
        return
    fi
    environment=${environment:-$bootstrap_root/.venv}
    # Read by the script that sources this file.
    # shellcheck disable=SC2034
    python=$environment/bin/python
    # shellcheck disable=SC2094 # the checkout's folder is locked, not read
    (
        cd -- "$bootstrap_root" || exit
        # One set-up at a time in a checkout; the lock ends with this subshell.
        if command -v flock >/dev/null; then flock 9; fi
        if ! "$environment/bin/python" -m pip --version >/dev/null 2>&1; then
            if [ "$environment" != "$bootstrap_root/.venv" ]; then
                bootstrap_fail "the active environment $environment has no pip; add it: $environment/bin/python -m ensurepip"
                exit
            fi
            printf 'Making the virtual environment %s ...\n' "$environment" >&2
            make_environment "$environment" || exit
        fi
        bootstrap_install "$environment" "$@"
    ) 9<"$bootstrap_root"
}
