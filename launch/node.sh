# shellcheck shell=bash
# What one node of a job does: torchrun with the ranks of this node. Sourced by the file that
# launch/common.sh writes for each job, which sets these:
# shellcheck disable=SC2154
: "$job $nodes $ranks_per_node $restarts $save_seconds ${gpus?} $meeting_point $logs ${arguments[*]} $checkout"

# There are as many ranks as the first node has GPUs. If it has none, ranks run on the CPU, but
# those of a node with GPUs would use these.
count=$(python -P -c 'import torch; print(torch.cuda.device_count())') || exit
if [ -n "$gpus" ] && ((gpus ? count < gpus : count)); then
    printf 'node %s has %d GPU(s), the first node %d; ask for nodes that are alike, leave this one out, or set RANKS_PER_NODE\n' \
        "$(hostname)" "$count" "$gpus" >>"$logs/REFUSED"
    exit 2
fi

# An aborted rank would leave a core dump in the checkout.
ulimit -c 0

# NCCL says why it fails and is silent otherwise; its own default says nothing at all.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# An error of one rank ends the others' collectives, which would otherwise wait for it forever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Rows differ in length between stages: GPU memory does not fragment if its segments can grow.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Cores are divided among the ranks of a node; torchrun would give each of them one thread.
cores=$(nproc)
[ "$cores" -ge "$ranks_per_node" ] || printf 'node %s gives %d core(s) to %d ranks: ask for more of them\n' \
    "$(hostname)" "$cores" "$ranks_per_node" >&2
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks_per_node ? cores / ranks_per_node : 1))}
# What a rank said last is in its log, even if it is killed.
export PYTHONUNBUFFERED=1
# How long torchrun waits for its ranks, which are saving, after a signal.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$save_seconds

# With restarts, the first rank hosts the ranks' store instead of torchrun, which would give
# restarted ranks the addresses of those that have died. Without restarts, torchrun's store outlives
# the first rank, so that the others can find out who is gone.
[ "$restarts" -eq 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# The ranks' output goes to files of their own, in a folder of this node's, and to the job's log.
exec python -P -m megatron_bert.jobs.torchrun \
    --nnodes="$nodes" --nproc-per-node="$ranks_per_node" --max-restarts="$restarts" \
    --rdzv-backend=c10d --rdzv-id="$job" --rdzv-endpoint="$meeting_point" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 \
    --log-dir="$logs/$(hostname)" --tee=3 \
    "$checkout/pretrain_bert.py" "${arguments[@]}"
