#!/usr/bin/env bash
# From nothing to a filled mask: sets itself up, pretrains a small RetrievaBERT, exports it.
set -u

usage() {
    cat <<'TEXT'
usage: bash examples/quickstart.sh [CORPUS.jsonl|CORPUS.txt ...] [key.path=value ...]

Trains a tokenizer, builds the datasets, pretrains a small RetrievaBERT through all four row
lengths, evaluates it, exports it to Hugging Face, fills masks with transformers, and writes a
report. Without a corpus it takes the one in examples/corpus. A .jsonl file has an object with the
key "text" a line, a .txt file one document a line; .gz and .zst are read too.

key.path=value replaces a key of examples/quickstart.yaml, e.g. curriculum.0.steps=500.

Everything lands in one folder under runs/, named after the input: run again it reuses what stands,
interrupted it goes on.
TEXT
}

corpora=()
overrides=()
for argument in "$@"; do
    case $argument in
        -h | --help)
            usage
            exit 0
            ;;
        -*)
            printf 'error: unknown flag %s\n\n' "$argument" >&2
            usage >&2
            exit 2
            ;;
    esac
    if [ -e "$argument" ]; then
        corpora+=("$(realpath -- "$argument")")
    elif [[ $argument =~ ^(run\.dir|data\..*)= ]]; then
        printf 'error: %s: run.dir and data are set by this script; name your text as files\n' \
            "$argument" >&2
        exit 2
    elif [[ $argument =~ ^[a-z_]+(\.[a-z0-9_]+)+= ]]; then
        overrides+=("$argument")
    else
        printf 'error: %s: no such file; name .jsonl or .txt files, or keys as key.path=value\n' \
            "$argument" >&2
        exit 2
    fi
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
        printf '\nThe command above ended with %s. Mended, the same call goes on from there.\n' \
            "$status" >&2
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

# The folder's name follows from what the result depends on, so that nothing stale is reused.
set -o pipefail
fingerprint=$(
    for input in "${corpora[@]}" examples/quickstart.yaml; do
        printf '%s ' "${input##*/}"
        sha256sum <"$input" || exit 1
    done | cat - <(printf '%s\n' "${overrides[@]:-}") | sha256sum | cut -c 1-8
) || exit 1
folder=runs/quickstart-$fingerprint
mkdir -p -- "$folder" || exit 1
printf '  everything lands in %s\n' "$folder"

say "2/8 Held-out text: one document in twenty is never trained on, to measure what was learned"
stands "$folder/train.jsonl" "The split" || run tools/split_corpus.py --input "${corpora[@]}" \
    --train "$folder/train.jsonl" --valid "$folder/valid.jsonl"

say "3/8 Tokenizer: the vocabulary, learned from the text itself (SentencePiece, unigram)"
# About one piece for every 60 bytes of text, between 1,000 and 16,000.
pieces=$(($(wc -c <"$folder/train.jsonl") / 60))
pieces=$((pieces < 1000 ? 1000 : pieces > 16000 ? 16000 : pieces))
stands "$folder/tokenizer.model" "The tokenizer" || run tools/train_tokenizer.py \
    --input "$folder/train.jsonl" --vocab-size "$pieces" --allow-fewer \
    --output "$folder/tokenizer.model"

say "4/8 Datasets: text as token ids in Megatron's .bin/.idx format, read by memory mapping"
for part in train valid; do
    stands "$folder/$part.idx" "The dataset" || run tools/preprocess_data.py --overwrite \
        --input "$folder/$part.jsonl" --tokenizer "$folder/tokenizer.model" \
        --output-prefix "$folder/$part"
done

say "5/8 Pretraining: masked language modelling over rows of 128, 256, 512 and 2,048 tokens"
keys=("run.dir=$folder/run" "data.tokenizer=$folder/tokenizer.model"
    "data.train.0.prefix=$folder/train" "data.valid.0.prefix=$folder/valid")
if [ -r /proc/cpuinfo ] && ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo && ! command -v nvidia-smi >/dev/null; then
    echo "  (this processor has no BF16 instructions: computing in FP32)"
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

say "8/8 Fill masks: in sentences of the corpus a word is hidden; the model's five best guesses"
run examples/fill_masks.py --model "$folder/huggingface" --input "$folder/train.jsonl" ||
    exit 1

say "Done. What lies where:"
cat <<TEXT
  $folder/loss.png         the loss curve
  $folder/report.html      the run's report: open it in a browser
  $folder/huggingface/     the model, for transformers
  $folder/run/             metrics.jsonl, checkpoints, the resolved configuration

Next:
  python -c "from transformers import pipeline; print(pipeline('fill-mask', '$folder/huggingface', trust_remote_code=True)('日本の首都は<MASK>です。'))"
  bash examples/quickstart.sh YOUR_TEXT.jsonl       the same on your own text
  less README.md docs/training.md                   larger models, several GPUs, other options
(in the environment: source $(printf '%q' "${python%/python}/activate"))
TEXT
