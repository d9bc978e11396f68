#!/usr/bin/env bash
# From nothing to a filled mask: sets itself up, pretrains a small RetrievaBERT, exports it.

# Called as `sh quickstart.sh`: another shell would stumble over what follows.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set +o posix
set -u

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [--json-key KEY] [--on-error fail|skip]
                                   [CORPUS.jsonl|CORPUS.txt ...] [key.path=value ...]

Trains a tokenizer, builds the datasets, pretrains a small RetrievaBERT through all four row
lengths, evaluates it, exports it to Hugging Face, fills masks with transformers, and writes a
report. Without a corpus it takes the one in examples/corpus. A .jsonl file has an object with the
key "text" a line, a .txt file one document a line; .gz and .zst are read too.

  --json-key KEY        the key of the text in .jsonl files, where it is not "text"
  --on-error fail|skip  at a line that cannot be read: stop (as by default), or leave it out
  key.path=value        replaces a key of examples/quickstart.yaml, e.g. curriculum.0.steps=500

Everything lands in one folder under runs/, named after the input and the options: called again with
the same ones it reuses what stands, and goes on where it was interrupted.
TEXT
}

# refuse WHAT: before anything is set up.
refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

check_corpus() {
    [ ! -d "$1" ] || refuse "$1: a folder; name the .jsonl or .txt files in it"
    [[ $1 =~ \.(jsonl|txt)(\.gz|\.zst)?$ ]] ||
        refuse "$1: unknown kind of text file; give .jsonl or .txt, either with .gz or .zst too"
    [ -r "$1" ] || refuse "$1: cannot be read; check who may"
}

corpora=()
overrides=()
# How the files are read, see tools/split_corpus.py; the split's files have the same key.
reading=()
key=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --json-key=* | --on-error=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --json-key | --on-error)
            [ -n "${2:-}" ] || refuse "$1: give a value behind it; --help says which"
            [ "$1" != --on-error ] || [[ $2 =~ ^(fail|skip)$ ]] ||
                refuse "--on-error $2: give fail or skip"
            reading+=("$1" "$2")
            [ "$1" != --json-key ] || key=("$1" "$2")
            shift
            ;;
        -*)
            usage >&2
            refuse "unknown flag $1"
            ;;
        *)
            if [ -e "$1" ]; then
                check_corpus "$1"
                corpora+=("$(realpath -- "$1")")
            elif [[ $1 =~ ^(run(\.dir)?|data(\..*)?)= ]]; then
                refuse "$1: run.dir and data are set by this script; name your text as files"
            elif [[ $1 =~ ^[a-z_]+(\.[a-z0-9_]+)*= ]]; then
                overrides+=("$1")
            else
                refuse "$1: no such file; name .jsonl or .txt files, or keys as key.path=value"
            fi
            ;;
    esac
    shift
done

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
[ "${#corpora[@]}" -gt 0 ] || corpora=("$PWD"/examples/corpus/*.jsonl)

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }
[ -t 1 ] || say() { printf '\n%s\n' "$1"; }

# run PROGRAM ARGUMENT...: shows the command as one would type it, then runs it.
run() {
    local words
    printf -v words ' %q' "$@"
    printf '  $ python%s\n' "$words"
    "$python" "$@" || {
        status=$?
        printf '\nThe command above ended with %s. The same call, with the same input and options, %s\n' \
            "$status" "goes on from there; with others it begins in another folder." >&2
        exit "$status"
    }
}

# stands PATH WHAT: whether an earlier call made it already; says so.
stands() {
    [ -e "$1" ] || return
    printf '  %s stands already: %s\n' "$2" "$1"
}

say "1/8 Set-up: a virtual environment with PyTorch, transformers and the C++ data core"
# shellcheck source=tools/bootstrap.sh
. tools/bootstrap.sh
bootstrap examples || exit 1
# Refused now, not after minutes of work on the text.
"$python" pretrain_bert.py --config examples/quickstart.yaml "${overrides[@]}" --print-config \
    >/dev/null || exit

# The folder's name follows from what the result depends on, so that nothing stale is reused.
set -o pipefail
fingerprint=$(
    for input in "${corpora[@]}" examples/quickstart.yaml; do
        printf '%s ' "${input##*/}"
        sha256sum <"$input" || exit 1
    done | cat - <(printf '%s\n' "${reading[@]}" "${overrides[@]:-}") | sha256sum | cut -c 1-8
) || exit 1
folder=runs/quickstart-$fingerprint
mkdir -p -- "$folder" || exit 1
printf '  everything lands in %s\n' "$folder"

say "2/8 Held-out text: one document in twenty is never trained on, to measure what was learned"
stands "$folder/train.jsonl" "The split" || run tools/split_corpus.py --overwrite \
    --input "${corpora[@]}" --train "$folder/train.jsonl" --valid "$folder/valid.jsonl" "${reading[@]}"

say "3/8 Tokenizer: the vocabulary, learned from the text itself (SentencePiece, unigram)"
# About one piece for every 60 bytes of text, between 1,000 and 16,000.
text_bytes=$("$python" -c '
import sys
from pathlib import Path
from megatron_bert.data.text import DocumentReader, iterate_documents
reader = DocumentReader([Path(sys.argv[1])], json_key=sys.argv[2])
print(sum(len(text.encode()) for text in iterate_documents(reader)))
' "$folder/train.jsonl" "${key[1]:-text}") || exit
pieces=$((text_bytes / 60))
pieces=$((pieces < 1000 ? 1000 : pieces > 16000 ? 16000 : pieces))
stands "$folder/tokenizer.model" "The tokenizer" || run tools/train_tokenizer.py \
    --input "$folder/train.jsonl" --vocab-size "$pieces" --allow-fewer \
    --output "$folder/tokenizer.model" "${key[@]}"

say "4/8 Datasets: text as token ids in Megatron's .bin/.idx format, read by memory mapping"
for part in train valid; do
    stands "$folder/$part.idx" "The dataset" || run tools/preprocess_data.py --overwrite \
        --input "$folder/$part.jsonl" --tokenizer "$folder/tokenizer.model" \
        --output-prefix "$folder/$part" "${key[@]}"
done

say "5/8 Pretraining: masked language modelling over rows of 128, 256, 512 and 2,048 tokens"
keys=("run.dir=$folder/run" "data.tokenizer=$folder/tokenizer.model"
    "data.train.0.prefix=$folder/train" "data.valid.0.prefix=$folder/valid")
if [ -r /proc/cpuinfo ] && ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && ! command -v nvidia-smi >/dev/null; then
    echo "  (this processor has no BF16 instructions: computing in FP32, which takes longer)"
    keys+=(precision.compute=fp32)
fi
stands "$folder/run/FINISHED" "The trained model" || run pretrain_bert.py \
    --config examples/quickstart.yaml "${keys[@]}" "${overrides[@]}"
if [ -e "$folder/run/STOPPED" ]; then
    echo "Stopped early, and saved: the same call goes on from here."
    exit 0
fi

say "6/8 Report: the loss curve as a picture, and a page with the run's figures"
run tools/report.py "$folder/run" --output "$folder/report.html" --picture "$folder/loss.png"

say "7/8 Export: a directory that transformers loads"
stands "$folder/huggingface" "The export" || run tools/convert_checkpoint.py to-hf \
    --checkpoint "$folder/run" --output "$folder/huggingface"

say "8/8 Fill masks: a word of a sentence is hidden; five guesses, the right one in [brackets]"
run examples/fill_masks.py --model "$folder/huggingface" --input "$folder/train.jsonl" \
    "${key[@]}" |
    tee "$folder/guesses.txt" || exit

# quoted TEXT: as one word of a shell, in quotes whatever is in it.
quoted() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

place=$PWD/$folder
say "Done. What lies in $place:"
cat <<TEXT
  loss.png         the loss curve
  report.html      the run's report: open it in a browser
  huggingface/     the model, for transformers
  guesses.txt      what it put at the masks
  run/             metrics.jsonl, checkpoints, the resolved configuration

Larger models, several GPUs, other options: $PWD/README.md

Next, each line can be pasted as it stands:
TEXT
# A sentence that was guessed right, else any; with the model's own mask token in it.
sentence=$({ grep '^yes  ' "$folder/guesses.txt" || grep '^no   ' "$folder/guesses.txt"; } |
    head -n 1 | cut -c 6-)
fill='import sys, transformers; fill = transformers.pipeline("fill-mask", sys.argv[1], trust_remote_code=True); print(*fill(sys.argv[2]), sep="\n")'
[ -z "$sentence" ] || printf '  %s -c %s %s %s  # the model in transformers\n' "$(quoted "$python")" \
    "$(quoted "$fill")" "$(quoted "$place/huggingface")" "$(quoted "$sentence")"
printf '  bash %s --help  # the same on your own text\n' "$(quoted "$PWD/examples/quickstart.sh")"
activate=${python%/python}/activate
[ ! -e "$activate" ] || printf '  source %s  # the environment, for the commands of README.md\n' \
    "$(quoted "$activate")"
