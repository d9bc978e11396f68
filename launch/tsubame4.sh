#!/usr/bin/env bash
# A run on TSUBAME 4 (or another Grid Engine), in as many jobs as it needs:
#
#   qsub -g GROUP -l node_f=8 -l h_rt=24:00:00 [...] launch/tsubame4.sh CONFIG [key=value ...]
#
# Submit it in the checkout's root. Options on the command line win over these lines, which are
# there to be edited. Each job saves and stops before its limit and submits a copy of itself, with
# the same options, until the run directory says FINISHED. docs/clusters.md tells the rest.
#
#$ -N megatron_bert
#$ -cwd
# Grid Engine may ignore the first line.
#$ -S /bin/bash
# Whole nodes with 4 GPUs each; at most 64. Not requested here, because another type of node on the
# command line would be requested in addition.
##$ -l node_f=1
#$ -l h_rt=24:00:00
# The job is scheduled again if it asks for that, or a node fails.
#$ -r y
# USR2 ahead of the limit: the second line of defence, if the deadline fails.
#$ -notify
# One log.
#$ -j y

usage="qsub -g GROUP -l node_f=N [OPTIONS] launch/tsubame4.sh CONFIG [key=value ...]"
case ${1:-} in
    -h | --help)
        sed -n '/^#\$ /q; 2,$s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
# Grid Engine runs a copy of this script from elsewhere.
if [ -z "${JOB_ID:-}" ] || ! cd -- "${SGE_O_WORKDIR:-/}" || [ ! -r launch/common.sh ]; then
    echo "error: submit this script, in the checkout's root: $usage" >&2
    exit 2
fi
: "${MODULES:=cuda nccl}"
checkout=$PWD
. launch/common.sh
# The tasks of an array would be as many jobs of one run.
[ "${SGE_TASK_ID:-undefined}" = undefined ] || refuse "an array job cannot train one run; submit without -t"

job=$JOB_ID
# The file's first column has the hosts; without a parallel environment there is only this host.
if [ -n "${PE_HOSTFILE:-}" ]; then
    mapfile -t hosts < <(cut -d ' ' -f 1 "$PE_HOSTFILE" | awk '!seen[$0]++')
else
    hosts=("$(hostname)")
fi
nodes=${#hosts[@]}
first=$(hostname)
# Counted from now: the job has just begun.
# Some versions print hard_resource_list, and some append a number to it.
limit=$(ask qstat -j "$job" | sed -n 's/^hard[ _]resource_list[ 0-9]*:.*[ ,]h_rt=\([0-9:]*\).*/\1/p' |
    awk -F : '{ for (i = 1; i <= NF; i++) seconds = 60 * seconds + $i; print seconds }')
end=${limit:+$(($(date +%s) + limit))}
term_signal=TERM
notice_signal=TERM
# USR2 comes ahead of the limit, and ahead of a qdel too: the time tells which. If the time is not
# known, another job must be able to follow. USR1 comes ahead of a suspension, and at a soft limit.
notices=USR1
[ -n "$end" ] || {
    notices="USR1 USR2"
    tell "Grid Engine tells no h_rt of this job; the run stops by the signal alone, and to end it by qdel put a file HOLD into the run directory first"
}

# A copy, with all options. (A parallel job that asks by an exit code of 99 to be scheduled again may
# wait for ever: its hosts do not count as free.)
submit_again() {
    local answer copy
    # A copy that could not be announced would count its tries anew, forever. It is held until
    # everything has been announced.
    announce any || return 1
    answer=$(qresub -h u "$job")
    copy=$(sed -n 's/^Your job \([0-9]*\) .*/\1/p' <<<"$answer")
    if [ -z "$copy" ]; then
        tell "qresub tells no number (it said: ${answer:-nothing}); if qstat shows a held copy of this job, qrls it or qdel it"
        return 1
    fi
    announce "$copy" || tell "the number of job $copy could not be noted; its tries are counted on all the same"
    # If it asks for a range of slots, it would begin on the first that are free.
    qalter -hold_jid "$job" "$copy" >&2 || tell "job $copy does not wait for the end of this one"
    if qalter -h U "$copy" >&2; then
        tell "job $copy follows"
    else
        tell "job $copy follows, but it is held; release it by: qrls $copy"
    fi
}

# One torchrun a node: here, and on the others through Grid Engine, which ends them with the job.
# shellcheck disable=SC2329 # run_job calls it
on_every_node() {
    local host here told="" last all=$BASHPID others=()
    bash "$node_script" &
    here=$!
    # The ranks of one node pass it on to all others. Signalled twice, torchrun no longer waits for
    # its ranks.
    trap '[ -n "$told" ] || kill -s TERM "$here"; told=yes' TERM
    # The script handles these, but they may reach all processes.
    trap : USR1 USR2
    for host in "${hosts[@]}"; do
        # Compared without their domains, which one of the two may have.
        if [ "${host%%.*}" != "${first%%.*}" ]; then
            # Its remote shell parses the command once more. The first node that fails ends the others,
            # which would otherwise wait for its ranks.
            {
                qrsh -inherit -nostdin -V "$host" bash "$(printf '%q' "$node_script")" ||
                    kill -s TERM "$all"
            } &
            others+=($!)
        fi
    done
    wait_for "$here"
    # Their ranks end with those of this node, and a job that left first would cut them short. But a host
    # that is lost is not waited for, nor are ranks that wait for a node that was refused.
    last=$((SECONDS + SAVE_SECONDS))
    while kill -0 "${others[@]}" 2>/dev/null && [ "$SECONDS" -lt "$last" ] && [ ! -e "$logs/REFUSED" ]; do
        sleep 1
    done
}

prepare_job "$@"
run_job on_every_node
follow
