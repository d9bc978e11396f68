# shellcheck shell=bash
# What the scripts of this folder share. Before a script sources this, it sets checkout: the
# checkout whose scripts run, and where an environment may be. The script knows its scheduler;
# before it calls prepare_job, it sets these variables:
#
#   job           the scheduler's number of the job
#   nodes         how many nodes it has
#   first         the node whose torchrun the others meet
#   end           when the scheduler ends the job, in seconds since 1970; empty if it never does, or
#                 does not tell
#   term_signal   the signal for the ranks of a cancelled job; 0 for none, if the scheduler signals
#                 them itself: signalled twice, torchrun no longer waits for its ranks
#   notices       signals by which the scheduler tells that the job's limit is near; other signals
#                 that end a job come from a person
#   notice_signal the signal for the ranks on a notice
#   usage         how the script is called
#
# and, if it calls `follow`, it defines a function submit_again that submits another job.

# Settings, from the environment:
#   RANKS_PER_NODE   ranks on each node                    (default: one for every GPU, else one)
#   TRIES            jobs in a row that may end without a checkpoint 10 steps newer     (default 3)
#   RESTARTS         failures of ranks that torchrun heals inside a job                 (default 0)
#   MARGIN_SECONDS   how long before the scheduler's limit the run has saved and left (default 180)
#   LEAST_SECONDS    a job that has less time than this before it must leave is refused (default 300)
#   SAVE_SECONDS     how long ranks may take to save after a signal                   (default 600)
#   PORT             where the nodes meet       (default: from the job's number, 20000 to 29999)
#   MODULES          modules to load, where the machine has them

: "${checkout?}"
: "${TRIES:=3}" "${RESTARTS:=0}" "${MARGIN_SECONDS:=180}" "${LEAST_SECONDS:=300}"
: "${SAVE_SECONDS:=600}" "${MODULES:=}"

tell() { printf '%s  %s\n' "$(date '+%F %T')" "$*" >&2; }

# ask COMMAND ...: prints what a scheduler's command answers; a busy scheduler is asked again.
ask() {
    local try answer
    for try in 1 2 3; do
        [ "$try" -eq 1 ] || sleep 5
        if answer=$("$@"); then
            printf '%s\n' "$answer"
            return
        fi
    done
    return 1
}

# refuse WHAT: nothing runs, and no other job follows.
refuse() {
    tell "error: $1"
    exit 2
}

# A setting that is not a number would end a function half-way, but not the script.
check_settings() {
    local name value
    for name in TRIES RESTARTS MARGIN_SECONDS LEAST_SECONDS SAVE_SECONDS RANKS_PER_NODE PORT; do
        value=${!name:-}
        [ -n "$value" ] || continue
        [[ $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "$name=$value: set a whole number, 0 or above"
    done
    [ "$TRIES" -ge 1 ] || refuse "TRIES=$TRIES: set at least 1"
    [ "${RANKS_PER_NODE:-1}" -ge 1 ] || refuse "RANKS_PER_NODE=$RANKS_PER_NODE: set at least 1"
    [ "${PORT:-1}" -ge 1 ] && [ "${PORT:-1}" -le 65535 ] || refuse "PORT=$PORT: set 1 to 65535"
}

load_modules() {
    local name file
    # A job's shell is not a login shell, which would have this function.
    for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
        # shellcheck source=/dev/null
        command -v module >/dev/null || . "$file" 2>/dev/null
    done
    if [ -n "$MODULES" ] && ! command -v module >/dev/null; then
        tell "this machine has no command module; going on without MODULES=$MODULES"
        return
    fi
    for name in $MODULES; do
        module load "$name" || tell "module $name cannot be loaded; going on without it"
    done
}

# Finds a Python that has the project: that of an active environment, else .venv in the checkout.
# Sets $gpus, the number of this node's GPUs.
find_environment() {
    local answer package
    # Otherwise a module's Python would come first.
    [ -z "${VIRTUAL_ENV:-}" ] || PATH=$VIRTUAL_ENV/bin:$PATH
    if ! answer=$(ask_python 2>/dev/null) && [ -r "$checkout/.venv/bin/activate" ]; then
        # shellcheck source=/dev/null
        . "$checkout/.venv/bin/activate"
    fi
    [ -n "$answer" ] || answer=$(ask_python) || refuse \
        "$(command -v python || echo python) cannot import megatron_bert and torch; make the environment $checkout/.venv as README.md says, or activate another before you submit"
    read -r gpus package <<<"$answer"
    tell "Python is $(command -v python), the package $package"
    [[ $package == "$checkout"/* ]] || tell "warning: that package is not this checkout's, $checkout"
}

# How many GPUs there are, and where the package is.
ask_python() {
    python -P -c 'import megatron_bert, torch; print(torch.cuda.device_count(), megatron_bert.__path__[0])'
}

# A job that must leave as soon as it has begun would take one step, and another like it would
# follow.
check_time() {
    local left
    [ -n "$end" ] || return 0
    left=$((end - $(date +%s)))
    [ $((left - MARGIN_SECONDS)) -ge "$LEAST_SECONDS" ] || refuse \
        "the job's limit is in $left s, and the run leaves MARGIN_SECONDS=$MARGIN_SECONDS s earlier: less than $LEAST_SECONDS s are left to train; ask for a longer limit, or set a shorter MARGIN_SECONDS"
}

# prepare_job CONFIG [key=value ...]: checks all that can be checked before ranks are started, and
# writes $node_script.
prepare_job() {
    local config=${1:-} answer
    : "${job:?}" "${nodes:?}" "${first:?}" "${end?}" "${term_signal:?}" "${notices?}" "${notice_signal:?}" "${usage:?}"
    [ -n "$config" ] || refuse "no configuration; usage: $usage"
    shift
    node_script=
    check_settings
    check_time
    load_modules
    find_environment
    ranks_per_node=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
    answer=$(python -P -m megatron_bert.jobs begin --job "$job" --tries "$TRIES" \
        --config "$config" --ranks $((nodes * ranks_per_node)) -- "$@") || refuse "the run cannot start: see above"
    mapfile -t answer <<<"$answer"
    run_dir=${answer[0]}
    arguments=(--config "$config" "$@" "${answer[@]:1}")
    [ -z "$end" ] || arguments+=("run.deadline=$((end - MARGIN_SECONDS))")
    write_node_script
    tell "job $job: $nodes node(s), $ranks_per_node rank(s) each, run.dir $run_dir, logs in $logs"
    [ -z "$end" ] || tell "the job's limit is $(date -d "@$end" '+%F %T'); the run leaves $MARGIN_SECONDS s earlier"
}

# Writes what every node runs, with this job's values, into a file, because some launchers lose a
# command's quotes. The file can be read afterwards.
write_node_script() {
    local name port=${PORT:-$((20000 + 10#0${job//[!0-9]/} % 10000))}
    logs=$PWD/$run_dir/logs/$job
    [[ $run_dir != /* ]] || logs=$run_dir/logs/$job
    mkdir -p -- "$logs" || refuse "the folder $logs cannot be made"
    node_script=$logs/node.sh
    # A job that was queued again keeps its number and its folder.
    rm -f -- "$logs/REFUSED"
    {
        printf '# Job %s, as each of its nodes ran it.\n' "$job"
        # A shell on another node knows nothing of what was loaded and activated here.
        for name in PATH LD_LIBRARY_PATH VIRTUAL_ENV; do
            [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
        done
        printf 'job=%q nodes=%q ranks_per_node=%q restarts=%q save_seconds=%q\n' \
            "$job" "$nodes" "$ranks_per_node" "$RESTARTS" "$SAVE_SECONDS"
        # A user who sets the number of ranks knows the nodes.
        printf 'gpus=%q meeting_point=%q logs=%q\n' \
            "$([ -n "${RANKS_PER_NODE:-}" ] || echo "$gpus")" "$first:$port" "$logs"
        printf 'arguments=('
        printf '%q ' "${arguments[@]}"
        printf ')\ncheckout=%q\ncd -- %q && . %q\n' "$checkout" "$PWD" "$checkout/launch/node.sh"
    } >"$node_script" || refuse "$node_script cannot be written"
}

# run_job COMMAND ...: starts the ranks by a command that ends when they have, and waits for it.
# Signals that ask for a stop reach the ranks through it; they save, and the command ends.
#
# stop_reason tells what was asked for: empty, "notice" (the scheduler's, ahead of its limit) or
# "cancelled" (by a person).
run_job() {
    : "${node_script:?the job was not prepared}"
    stop_reason=
    ranks=
    asked=()
    # Set before the ranks are started: a signal in between would not reach them.
    trap 'pass_on cancelled "$term_signal"' TERM INT HUP USR1 USR2
    # shellcheck disable=SC2086 # one signal a word
    [ -z "$notices" ] || trap 'pass_on notice "$notice_signal"' $notices
    "$@" &
    ranks=$!
    [ ${#asked[@]} -eq 0 ] || pass_on "${asked[@]}"
    wait_for "$ranks"
    trap - TERM INT HUP
    # The scheduler's notice may come now, and must not end the script, nor what it calls, before it has
    # submitted the next job.
    trap '' USR1 USR2
}

# wait_for PROCESS: a handled signal ends a plain wait while the process is still there.
wait_for() {
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
    done
}

# pass_on REASON SIGNAL
pass_on() {
    if [ -z "$ranks" ]; then
        asked=("$@")
        return
    fi
    if [ -n "$stop_reason" ] && [ -n "${second_signal_ends:-}" ]; then
        tell "told to stop again: the ranks are ended at once, without saving"
        kill -s KILL -- "-$ranks" 2>/dev/null
        return
    fi
    [ -n "$stop_reason" ] || stop_reason=$1
    # Schedulers end a job that reaches its limit as they end one that was cancelled.
    [ -z "$end" ] || [ "$(date +%s)" -lt $((end - 60)) ] || stop_reason=notice
    tell "told to stop ($stop_reason); the ranks finish their step and save"
    kill -s "$2" "$ranks" 2>/dev/null
}

# next_step: sets $following by what the run directory says, never by an exit code:
# finished, again, give-up, refused, held, or cancelled.
next_step() {
    [ ! -e "$logs/REFUSED" ] || refuse "$(<"$logs/REFUSED")"
    if [ "$stop_reason" = cancelled ]; then
        following=cancelled
        tell "cancelled: no other job follows"
        return
    fi
    # If even this fails, nothing follows.
    following=$(python -P -m megatron_bert.jobs judge --tries "$TRIES" "$run_dir") || following=give-up
    tell "what follows: $following"
}

# follow: ends this job, and submits another one if one must follow.
follow() {
    next_step
    case $following in
        finished | held | cancelled) exit 0 ;;
        refused) exit 2 ;;
        again)
            submit_again && exit 0
            tell "no other job can be submitted from here; submit this one again yourself to go on"
            ;;
    esac
    exit 1
}

# announce NUMBER: notes the number of the job that follows, if it is another one.
announce() { python -P -m megatron_bert.jobs announce --job "$1" "$run_dir"; }
