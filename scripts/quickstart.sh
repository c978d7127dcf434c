#!/usr/bin/env bash
# Set up, fetch or make the parts, pretrain, finetune, evaluate, and talk about a picture that was never trained on.
#   scripts/quickstart.sh          real weights and pictures: 10 to 12 minutes on two cores, after downloads of 300 MB
#   scripts/quickstart.sh --tiny   random models and drawn pictures: under two minutes, no downloads
# Finished stages are kept: run it again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

tiny=false
for argument in "$@"; do
    case "$argument" in
        --tiny) tiny=true ;;
        *) echo "unknown argument $argument; known: --tiny" >&2; exit 2 ;;
    esac
done

began=$SECONDS stage_began=$SECONDS
clock() { printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); }
say() {
    if [ $SECONDS -gt $stage_began ]; then printf '   (took %s)\n' "$(clock $((SECONDS - stage_began)))"; fi
    stage_began=$SECONDS
    printf '\n== %s   [%s since the start]\n' "$1" "$(clock $((SECONDS - began)))"
}
trap 'code=$?; echo "stopped (exit code $code). What is finished is kept: $0 $* goes on from there" >&2; exit $code' ERR

say "Setting up .venv"
if $tiny; then scripts/setup_venv.sh ""; else scripts/setup_venv.sh demo; fi
python=.venv/bin/python
vlm="$python -m vlm.cli.main"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
# glibc would hand every large tensor's memory back to the kernel and take it again: a fifth of a training step
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

if $tiny; then
    project=tiny data=cache/tiny/data test=eval_shape
    say "Making tiny models and pictures"
    $python scripts/prepare_tiny.py
    questions=("What is this?" "Which shape is it?")
else
    project=quickstart data=cache/dataset/quickstart test=eval_kind
    say "Fetching and converting weights and pictures (once)"
    $python scripts/prepare_demo.py
    questions=("What is this?" "What kind of thing is it?" "这是哪一类东西？")
fi
picture=$data/images/$($python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["image"])' $data/$test.jsonl)
run=cache/runs/$project

say "Stage 1 of 2: pretrain on captions"
$vlm train $project/pretrain
$vlm export $run/pretrain
say "Stage 2 of 2: finetune on conversations"
$vlm train $project/finetune
$vlm export $run/finetune
say "Evaluating on pictures that were never trained on"
$vlm eval $project/finetune
say "A conversation about $picture, which was never trained on"
printf '%s\n' "${questions[@]}" :his | $vlm chat $run/finetune/export --image "$picture" --max-new-tokens 40 |
    sed -n '/^user> /,$p' # the history, with the questions: what was typed does not show in a pipe
say "Done. Go on talking with:"
echo "    .venv/bin/vlm chat $run/finetune/export --image $picture"
