#!/usr/bin/env bash
# A run on this machine alone, with all its GPUs or with ranks on the CPU:
#
#   bash launch/local.sh CONFIG [key=value ...]
#   RANKS_PER_NODE=2 bash launch/local.sh CONFIG      # two ranks, where there is no GPU
#
# Relative paths are looked for where this is called, as by pretrain_bert.py.
#
# A run that fails is started again from its last checkpoint, up to TRIES times without a newer one.
# Ctrl-C or kill stops it: the step in hand is finished and saved, and the same command goes on from
# there. So does `run.max_minutes=N`. A second Ctrl-C ends it at once, without saving. `kill -9` of
# this script leaves the ranks running.

usage="bash launch/local.sh CONFIG [key=value ...]"
case ${1:-} in
    "" | -h | --help)
        sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        [ -n "${1:-}" ] || exit 2
        exit 0
        ;;
esac
# Not the folder to run in: relative paths, of CONFIG and in it, are relative to the caller's.
checkout=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
# shellcheck source=launch/common.sh
. "$checkout/launch/common.sh" || exit 2

job=local-$(date +%Y%m%dT%H%M%S)
nodes=1
first=localhost
end=
term_signal=TERM
notice_signal=TERM
notices=
# A second Ctrl-C.
second_signal_ends=yes

while true; do
    prepare_job "$@"
    # In a session of its own, so that a Ctrl-C reaches the ranks once, from here.
    run_job setsid bash "$node_script"
    next_step
    case $following in
        finished | held | cancelled) exit 0 ;;
        refused) exit 2 ;;
        again) [ ! -e "$run_dir/STOPPED" ] || exit 0 ;;
        *) exit 1 ;;
    esac
    job=local-$(date +%Y%m%dT%H%M%S)
    announce "$job"
done
