#!/usr/bin/env bash
# A run on Slurm, in as many jobs as it needs:
#
#   sbatch [--nodes=8 --gpus-per-node=4 --partition=NAME ...] launch/slurm.sh CONFIG [key=value ...]
#
# Submit it in the checkout's root. Options on the command line win over these lines, which are
# there to be edited. Each job saves and stops before its limit and puts itself into the queue again,
# with the same options, until the run directory says FINISHED. docs/clusters.md tells the rest.
#
#SBATCH --job-name=megatron_bert
# A range such as 2-8 works too. (With --ntasks-per-node Slurm gives the least of a range, and a
# waiting job whose number is changed never starts.)
#SBATCH --nodes=1
#SBATCH --time=24:00:00
##SBATCH --gpus-per-node=4
# Whole nodes, for their cores and memory; where nodes are shared: --cpus-per-gpu=N --mem-per-gpu=N.
##SBATCH --exclusive
##SBATCH --partition=NAME
##SBATCH --account=NAME
# A requeued job goes on in the same log.
#SBATCH --open-mode=append
# Requeue the job if a node fails, too.
#SBATCH --requeue
# Sent to this script two to three minutes before the limit, when the run should already have left
# (MARGIN_SECONDS): the second line of defence, if the deadline fails.
#SBATCH --signal=B:USR1@120

usage="sbatch [OPTIONS] launch/slurm.sh CONFIG [key=value ...]"
case ${1:-} in
    -h | --help)
        sed -n '/^#SBATCH/q; 2,$s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
esac
# Slurm runs a copy of this script from elsewhere.
if [ -z "${SLURM_JOB_ID:-}" ] || ! cd -- "${SLURM_SUBMIT_DIR:-/}" || [ ! -r launch/common.sh ]; then
    echo "error: submit this script, in the checkout's root: $usage" >&2
    exit 2
fi
checkout=$PWD
. launch/common.sh
# The tasks of an array would be as many jobs of one run; and srun takes only one part of a
# heterogeneous job.
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || refuse "a job array cannot train one run; submit without --array"
[ "${SLURM_HET_SIZE:-1}" -le 1 ] || refuse \
    "a heterogeneous job cannot train a run; submit with one set of options, without ':'"

job=$SLURM_JOB_ID
nodes=$SLURM_JOB_NUM_NODES
first=${RENDEZVOUS_HOST:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# A user may have chosen another format for times.
end=$(SLURM_TIME_FORMAT=standard ask scontrol show job --oneliner "$job" |
    sed -n 's/.* EndTime=\([0-9-]*T[0-9:]*\).*/\1/p')
# From an empty date, `date` would make the midnight that has passed.
[ -z "$end" ] || end=$(date -d "$end" +%s) || end=
# Slurm itself signals all processes of a cancelled job.
term_signal=0
notices="USR1 USR2"
notice_signal=USR1
[ -n "$end" ] || tell "Slurm tells no end of this job; the run stops by the signal alone"

# Puts the job into the queue again, under the same number.
submit_again() {
    # Slurm ends with a TERM what still runs of the job.
    trap '' TERM
    scontrol requeue "$job"
}

prepare_job "$@"
# One torchrun a node, with all its cores. The first that fails ends the others, which would
# otherwise wait for its ranks.
run_job srun --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    bash "$node_script"
follow
