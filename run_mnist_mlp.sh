#!/usr/bin/env bash
# The paper's MNIST experiment: an MLP of width 200 on 1,000 images for 100,000 epochs.
#
#   sbatch run_mnist_mlp.sh [FLAGS]                     one run, in logs/ and checkpoints/ of the current folder
#   sbatch --array=0-9 run_mnist_mlp.sh --width=1000    seeds 0 to 9, in runs/width_1000_seed_0 ... width_1000_seed_9
#   bash run_mnist_mlp.sh [FLAGS]                       the same without SLURM
#
# FLAGS are train.py's and win over those below. sbatch's own options, such as --partition, --account, --time or, on a
# cluster without GPUs, --gres=none, go before the script's name. What the job prints is in slurm-JOB.out. A job that is
# preempted or runs out of time saves its state, is requeued and continues by itself; one that was cancelled or failed
# continues when it is submitted again with the same FLAGS.

#SBATCH --gres=gpu:1
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before its time is up SLURM asks this script, by a signal, to stop.
#SBATCH --signal=B:USR1@120

fail() {
    echo "run_mnist_mlp.sh: error: $*" >&2
    exit 2
}

script=$0
if [[ $0 == */slurm_script ]]; then  # a batch job: SLURM runs a copy, by this name, from a folder of its own
    # The signals arrive here: hand them on to the run, or once it has been started.
    asked= run=
    hand_on() {
        asked=$1
        if [[ -n $run ]]; then kill -s "$asked" "$run" 2>/dev/null; fi
    }
    trap 'hand_on USR1' USR1
    trap 'hand_on TERM' TERM
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    echo "job $job on $(hostname), $(date), restarts: ${SLURM_RESTART_COUNT:-0}"
    # The script's name and after it the flags, with spaces between them: take words away until a file is left.
    script=$(scontrol show job "$job" | sed -n 's/^ *Command=//p')
    until [[ -f $script || $script != *" "* ]]; do script=${script% *}; done
fi
here=$(dirname "$(readlink -f "$script")")
[[ -f $here/train.py ]] || here=${SLURM_SUBMIT_DIR:-$here}
[[ -f $here/train.py ]] || fail "no train.py beside the script nor in $here: submit the script where it lies"

for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
              "$here/.venv/bin/python" python python3 ""; do
    "$python" -c 'import sys, importlib.util as util
sys.exit(sys.version_info < (3, 11) or util.find_spec("torch") is None)' 2>/dev/null && break
done
[[ -n $python ]] || fail "no Python (3.11 or newer) with PyTorch found: activate a conda environment, load the" \
                         "cluster's module, or make a virtual environment in $here/.venv"

flags=(--model=mlp --dataset=mnist --train_size=1000 --batch_size=200 --lr=0.001 --weight_decay=0.01 --device=auto)
[[ " $*" == *" --n_steps"* ]] || flags+=(--n_epochs=100000)

save_dir=checkpoints
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    if [[ " $* " =~ " --"(seed|log_dir|save_dir)[=\ ] ]]; then
        fail "in an array the task's number is the seed, and each has its own folder: leave --${BASH_REMATCH[1]} out"
    fi
    flags+=(--seed="$SLURM_ARRAY_TASK_ID")
    folder=$("$python" "$here/sweep.py" --folder "${flags[@]}" "$@") || exit
    save_dir=$folder/checkpoints
    flags+=(--log_dir="$folder/logs" --save_dir="$save_dir")
fi
train=("$python" "$here/train.py" "${flags[@]}" --resume "$@")

[[ $0 == */slurm_script ]] || exec "${train[@]}"

before=
for word in "$@"; do
    [[ $word == --save_dir=* ]] && save_dir=${word#*=}
    [[ $before == --save_dir ]] && save_dir=$word
    before=$word
done
saved() { stat -c '%n %i %y' "$save_dir"/*.pt 2>/dev/null; }
saved_before=$(saved)

"${train[@]}" &
run=$!
sleep 1  # until then the run may still be a copy of this shell, which a signal does not end
if [[ -n $asked ]]; then hand_on "$asked"; fi
wait "$run"
status=$?
while kill -0 "$run" 2>/dev/null; do  # a signal ended the wait but not yet the run
    wait "$run"
    status=$?
done

# 138 and 143: stopped by USR1 and TERM. There is more to do if SLURM still counts the job as running, or ended it for
# the sake of another one; not if the job was cancelled, or is requeued already.
state=$(scontrol show job "$job")
if [[ $status =~ ^(138|143)$ && $state =~ JobState=RUNNING|PreemptTime=[0-9] ]]; then
    if [[ $status == 138 && $(saved) == "$saved_before" ]]; then
        echo "job $job is not requeued: it saved nothing since its start, so its time limit cannot hold one log step;" \
             "raise --time, or lower --adv_size, --lc_samples or the number of --epsilons"
    else
        echo "requeueing job $job"
        scontrol requeue "$job" || echo "job $job cannot be requeued here: submit it again with the same flags"
    fi
fi
exit "$status"
