#!/usr/bin/env bash
# What pretraining is worth: the same model fine-tuned on JSTS from pretrained and from random weights.

if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi
set +o posix
set -u -o pipefail

usage() {
    cat <<'TEXT'
usage: bash examples/jsts_margin.sh TRAIN_TEXT VALID_TEXT JSTS_FOLDER [key.path=value ...]

Trains a tokenizer on TRAIN_TEXT (.jsonl or .txt, .gz and .zst too), pretrains a small model on it
with examples/aozora_small_cpu.yaml, or aozora_small_gpu.yaml where there is a GPU, exports it, and
fine-tunes it on JSTS three times from the pretrained and three times from random weights, each at
the learning rate that suits it best.
JSTS_FOLDER holds JGLUE's train-*.json and valid-*.json.

  key.path=value   replaces a key of the configuration, e.g. curriculum.0.steps=3000

Everything lands in runs/jsts_margin; called again it goes on where it was interrupted. To begin
anew, with another text or other keys, remove that folder first.
TEXT
}

case ${1:-} in
    -h | --help)
        usage
        exit 0
        ;;
esac
if [ $# -lt 3 ]; then
    usage >&2
    exit 2
fi
for path in "$1" "$2" "$3"; do
    if [ ! -r "$path" ]; then
        printf 'error: %s: no such file or folder, or it may not be read\n' "$path" >&2
        exit 2
    fi
done
text=$(realpath -- "$1")
held_out=$(realpath -- "$2")
jsts=$(realpath -- "$3")
shift 3

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." || exit 1
# shellcheck source=tools/bootstrap.sh
. tools/bootstrap.sh
bootstrap examples jglue || exit 1
folder=runs/jsts_margin
mkdir -p -- "$folder" || exit 1

# made PATH PROGRAM ARGUMENT...: shows the command and runs it, unless what it makes stands already.
made() {
    local path=$1 words
    shift
    [ ! -e "$path" ] || return 0
    printf -v words ' %q' "$@"
    printf '$ python%s\n' "$words"
    "$python" "$@" || exit
}

made "$folder/tokenizer.model" tools/train_tokenizer.py --input "$text" --vocab-size 8192 \
    --max-sentences 20000 --output "$folder/tokenizer.model"
made "$folder/train.json" tools/preprocess_data.py --input "$text" --overwrite \
    --tokenizer "$folder/tokenizer.model" --output-prefix "$folder/train"
made "$folder/valid.json" tools/preprocess_data.py --input "$held_out" --overwrite \
    --tokenizer "$folder/tokenizer.model" --output-prefix "$folder/valid"
keys=("run.dir=$folder/run" "data.tokenizer=$folder/tokenizer.model"
    "data.train.0.prefix=$folder/train" "data.valid.0.prefix=$folder/valid")
config=examples/aozora_small_cpu.yaml
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    config=examples/aozora_small_gpu.yaml
elif ! grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then
    # A processor without BF16 instructions.
    keys+=(precision.compute=fp32)
fi
made "$folder/run/FINISHED" pretrain_bert.py --config "$config" "${keys[@]}" "$@"
[ -e "$folder/run/FINISHED" ] || exit 0
made "$folder/model" tools/convert_checkpoint.py to-hf --checkpoint "$folder/run" \
    --output "$folder/model"

# Small weights take larger rates than JGLUE's grid has, and random ones perhaps others than trained
# ones: each is given what suits it best.
tune() {
    local output=$1
    shift
    made "" tools/finetune_jglue.py --model "$folder/model" --task jsts --data "$jsts" \
        --learning-rate 3e-4 1e-3 --epochs 3 --seeds 1 2 3 --output "$folder/$output" "$@"
}
tune jsts_pretrained
tune jsts_random --random-weights
