#!/usr/bin/env bash
# From raw images to a model card, on drawn scenes and, where they are given, on photographs with a class a pixel:
#
#   examples/end_to_end.sh runs/end_to_end
#   IMAGES=IMAGES LABELS=LABELS CLASSES='["sky", "road"]' IGNORE='[11]' examples/end_to_end.sh runs/end_to_end
#
# Images with phrases become a data set; two teachers make its masks, `annotated` (those of the data) and a small SAM 2
# that is trained here; a model trains on each; its checkpoint has a card and answers a question. The first run of `age-vlm
# ground` and the first of `age-vlm train` are killed in the middle (kill -9), and gone on with. Run again, the script
# continues. The small SAM 2 has seen drawn scenes only: on photographs it shows that the chain runs, its masks there are worth nothing,
# which the mean IoU says. SCENES, CROPS (images), STEPS (of models) and SAM_STEPS say how long it takes.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
output="${1:?folder of the runs, such as runs/end_to_end}"
scenes="${SCENES:-4000}" crops="${CROPS:-3000}" steps="${STEPS:-400}" sam_steps="${SAM_STEPS:-3000}"
sam="$output/tiny-sam"
mkdir -p "$output"

step() { printf '\n== %s\n' "$*"; }

# killed_and_resumed SIGN COMMAND...: runs the command, kills it when a file like SIGN is there, and runs it again.
killed_and_resumed() {
  local sign="$1"
  shift
  "$@" >"$output/killed.log" 2>&1 &
  local process=$!
  until compgen -G "$sign" >/dev/null || ! kill -0 "$process" 2>/dev/null; do sleep 0.2; done
  if kill -9 "$process" 2>/dev/null; then step "killed: $*"; fi
  wait "$process" 2>/dev/null || true
  "$@"
}

# whole DATA RECIPE SETTINGS...: from a data set with masks or boxes to a model for each teacher.
whole() {
  local data="$1" recipe="$2"
  shift 2
  local teacher masks run ground train
  for teacher in annotated sam2-transformers; do
    masks="$output/$data-masks-$teacher" run="$output/$data-model-$teacher"
    step "$data: masks by $teacher"
    ground=(age-vlm ground "$output/$data" --teacher "$teacher" --output "$masks" --shard-size "${SHARD_SIZE:-200}")
    if [ "$teacher" != annotated ]; then ground+=(--model "$sam"); fi
    train=(age-vlm train "$recipe" "name=$data-$teacher" "data.kind=dataset" "data.path=$masks" data.validation=100
      "training.steps=$steps" "training.save_every=$(((steps + 3) / 4))" "$@" --output "$run" --resume)
    if [ "$data-$teacher" = scenes-annotated ] && [ ! -e "$run" ]; then
      killed_and_resumed "$masks/data/*.parquet" "${ground[@]}"
      step "$data: training on masks by $teacher"
      killed_and_resumed "$run/trainer/checkpoint-*/whole" "${train[@]}"
    else
      "${ground[@]}"
      step "$data: training on masks by $teacher"
      "${train[@]}"
    fi
    step "$data: the card and a question"
    sed -n '1,12p' "$run/checkpoint/README.md"
    age-vlm ask "${question[$data]}" --model "$run/checkpoint" --image "$run/examples/0.png" --overlay "$run/overlay.png"
  done
}

declare -A question=([scenes]="is there a red circle?" [photographs]="is there a car in the picture?")

if [ ! -d "$sam" ]; then
  step "a small SAM 2"
  python "$here/train_tiny_sam.py" --output "$sam" --steps "$sam_steps"
fi

if [ ! -d "$output/scenes" ]; then
  step "scenes: images, phrases, masks"
  python - "$output/scenes" "$scenes" <<'PYTHON'
import sys

from age_vlm.data.scene_datasets import to_dataset

to_dataset("train", int(sys.argv[2])).save_to_disk(sys.argv[1])
PYTHON
fi
whole scenes "$here/../src/age_vlm/recipes/scenes.yaml" warm_start.steps=0

if [ -n "${IMAGES:-}" ]; then
  if [ ! -d "$output/photographs" ]; then
    step "photographs: crops, phrases, masks"
    python - "$output/photographs" "$IMAGES" "$LABELS" "$CLASSES" "${IGNORE:-[]}" "$crops" <<'PYTHON'
import json
import sys

from age_vlm.data.converters import convert

output, images, labels, classes, ignore, crops = sys.argv[1:]
data = convert(
    "label_maps",
    images=images,
    labels=labels,
    classes=json.loads(classes),
    ignore=json.loads(ignore),
    length=int(crops),
)
data.save_to_disk(output)
PYTHON
  fi
  whole photographs "$here/recipes/label_maps.yaml"
fi
