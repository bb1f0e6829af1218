#!/usr/bin/env bash
# Draws the figures of results/README.md from the histories next to it. Pictures of the partition are drawn only when they
# are named, from the checkpoints that results/run.sh left in RUNS.
#
#   bash results/figures.sh                     all of the histories
#   bash results/figures.sh rounding variants   these two
#   RUNS=/scratch/runs bash results/figures.sh partition mnist_partition
set -euo pipefail
cd "$(dirname "$0")/.."
named=" $* "
for name in "$@"; do
    grep -qE "^(curves|script|late_phase|partition) $name(\.gif)?( |$)" results/figures.sh ||
        { echo "results/figures.sh: no figure is named $name" >&2; exit 2; }
done

wanted() { [[ $named == "  " || $named == *" $1 "* ]]; }

shrink() {  # 128 colours look the same here and take a third of the space
    "${PYTHON:-python}" -c 'import sys; from PIL import Image
image = Image.open(sys.argv[1]).convert("RGB")
image.quantize(128, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=0).save(sys.argv[1], optimize=True)' "results/$1.png"
}

curves() {  # the figure's name, the histories' names
    local name=$1
    shift
    if wanted "$name"; then
        (cd results && "${PYTHON:-python}" ../plot.py "${@/%/.json}" --out="$name")
        shrink "$name"
    fi
}

script() {  # the figure's name, what draws it
    if wanted "$1"; then
        "${PYTHON:-python}" "results/$2"
        shrink "$1"
    fi
}

late_phase() {  # the figure's name
    if wanted "$1"; then
        "${PYTHON:-python}" results/late_phase.py "${1#late_phase_}"
        shrink "$1"
    fi
}

partition() {  # the figure's name, the run's, the checkpoints' steps
    if [[ $named == *" ${1%.*} "* ]]; then
        "${PYTHON:-python}" plot.py --out="results/$1" --partition \
            $(printf "${RUNS:-runs/results}/$2/checkpoints/checkpoint_*_step_%s.pt " "${@:3}")
        [[ $1 == *.gif ]] || shrink "$1"
    fi
}

curves first first
script rounding seeds.py
script resnet18_whole whole.py
script certified certified.py
curves from_image mnist_from_image mnist_stablemax_from_image
curves variants mnist_adam mnist_adam_exact mnist_batch_norm mnist_batch_norm_exact
curves large_init digits_large_init mnist_large_init
curves cnn cnn cnn_exact cnn_decay cnn_batch_norm
late_phase late_phase_decay
late_phase late_phase_images
late_phase late_phase_width
late_phase late_phase_depth
late_phase late_phase_activation
late_phase late_phase_optimizer

partition partition.gif first '*'
partition mnist_partition mnist_large_init 000005172 000027368 000100000
