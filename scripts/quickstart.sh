#!/usr/bin/env bash
# Set up, fetch or make the parts, pretrain, finetune, evaluate, and describe a picture that was never trained on.
#   scripts/quickstart.sh          real weights and pictures, about 20 minutes on two cores
#   scripts/quickstart.sh --tiny   random models and drawn pictures, under two minutes
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

began=$SECONDS
say() { printf '\n== %s   (%dm%02ds since the start)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }

say "Setting up .venv"
if $tiny; then scripts/setup_venv.sh ""; else scripts/setup_venv.sh demo; fi
python=.venv/bin/python
vlm="$python -m vlm.cli.main"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false

if $tiny; then
    project=tiny picture=cache/tiny/data/images/red-circle-0.png
    say "Making tiny models and pictures"
    $python scripts/prepare_tiny.py
else
    project=quickstart
    say "Fetching weights and pictures (once)"
    $python scripts/prepare_demo.py
    picture=$($python -c "import json; print('cache/dataset/quickstart/images/' + json.loads(open('cache/dataset/quickstart/eval_kind.jsonl').readline())['image'])")
fi

say "Stage 1 of 2: pretrain on captions, the projector alone"
$vlm train $project/pretrain
$vlm export cache/runs/$project/pretrain
say "Stage 2 of 2: finetune on conversations"
$vlm train $project/finetune
$vlm export cache/runs/$project/finetune
say "Evaluating on pictures that were never trained on"
$vlm eval $project/finetune
say "A conversation about $picture"
export_folder=cache/runs/$project/finetune/export
for question in "What is this?" "What kind of thing is this?" "这是什么？"; do
    echo "> $question"
    $vlm chat $export_folder --image "$picture" --prompt "$question" --max-new-tokens 40
done
say "Done. Go on talking with:"
echo "    .venv/bin/vlm chat $export_folder --image $picture"
