#!/usr/bin/env bash
# The paper's MNIST experiment: an MLP of width 200 on 1,000 images for 100,000 epochs.
#
#   sbatch run_mnist_mlp.sh [FLAGS]                     one run, in logs/ and checkpoints/ of the current folder
#   sbatch --array=0-9 run_mnist_mlp.sh --width=1000    seeds 0 to 9, in runs/width_1000_seed_0 ... width_1000_seed_9
#   bash run_mnist_mlp.sh [FLAGS]                       the same without SLURM
#
# FLAGS are those of train.py and override those below; with --preset those below are left out. Options of sbatch, such as
# --partition, --account, --time or, on a cluster without GPUs, --gres=none, go before the script's name. A job that is preempted or runs out of time saves its
# state, is requeued and continues; one that was cancelled or failed continues when it is submitted again.
#SBATCH --gres=gpu:1 --mem=8G --time=04:00:00 --requeue --open-mode=append
#SBATCH --signal=B:USR1@120
# The last line: two minutes before its time is up SLURM sends this script USR1.

fail() { echo "run_mnist_mlp.sh: error: $*" >&2; exit 2; }

script=$0
if [[ $0 == */slurm_script ]]; then  # a batch job runs a copy of this script, and gets the signals
    asked= run=
    hand_on() { asked=$1; if [[ -n $run ]]; then sleep 0.2; kill -s "$1" "$run" 2>/dev/null; fi }  # after its exec
    trap 'hand_on USR1' USR1
    trap 'hand_on TERM' TERM
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    echo "job $job on $(hostname), $(date), restarts: ${SLURM_RESTART_COUNT:-0}"
    script=$(scontrol show job "$job" | sed -n 's/^ *Command=//p')  # its path, then the flags, separated by spaces
    until [[ -f $script || $script != *" "* ]]; do script=${script% *}; done
fi
here=$(dirname "$(readlink -f "$script")")
[[ -f $here/train.py ]] || here=${SLURM_SUBMIT_DIR:-$here}
[[ -f $here/train.py ]] || fail "no train.py next to the script nor in $here: submit the script from its own folder"

for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
              "$here/.venv/bin/python" python python3 ""; do
    "$python" -c 'import sys, importlib.util as util
sys.exit(sys.version_info < (3, 11) or util.find_spec("torch") is None)' 2>/dev/null && break
done
[[ -n $python ]] || fail "no Python (3.11 or newer) with PyTorch found: activate a conda environment, load the" \
                         "cluster's module, or make a virtual environment in $here/.venv"

flags=(--model=mlp --dataset=mnist --train_size=1000 --batch_size=200 --lr=0.001 --weight_decay=0.01)
[[ " $* " == *" --preset"[=\ ]* ]] && flags=()
flags+=(--resume "$@")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    [[ " $* " =~ " --"(seed|log_dir|save_dir)[=\ ] ]] && fail "in an array the task's number is the seed, and each" \
        "task has its own folder: leave out --${BASH_REMATCH[1]}"
    flags+=(--seed="$SLURM_ARRAY_TASK_ID")
    folder=$("$python" "$here/sweep.py" --folder "${flags[@]}") || exit
    flags+=(--log_dir="$folder/logs" --save_dir="$folder/checkpoints")
fi
[[ $0 == */slurm_script ]] || exec "$python" "$here/train.py" "${flags[@]}"

save_dir=$(cd "$here" && "$python" -c 'import flags; print(flags.parse_args().save_dir)' "${flags[@]}") || exit
saved() { stat -c '%n %i %y' "$save_dir"/*.pt 2>/dev/null; }
saved_before=$(saved)
"$python" "$here/train.py" "${flags[@]}" &
run=$!
[[ -z $asked ]] || hand_on "$asked"
while wait "$run"; status=$?; kill -0 "$run" 2>/dev/null; do :; done  # a signal ends wait, but not yet the run

# 138 and 143: stopped by USR1 and TERM. Nothing is left to do if the job was cancelled or is requeued already.
state=$(scontrol show job "$job")
[[ $status =~ ^(138|143)$ && $state =~ JobState=RUNNING|PreemptTime=[0-9] ]] || exit "$status"
if [[ $status == 138 && $(saved) == "$saved_before" ]]; then
    echo "job $job is not requeued: it saved nothing since its start, so its time limit cannot hold one log step;" \
         "raise --time, or lower --adv_size, --lc_samples or the number of --epsilons"
else
    echo "requeueing job $job"
    scontrol requeue "$job" || echo "job $job cannot be requeued here: submit it again with the same flags"
fi
exit "$status"
