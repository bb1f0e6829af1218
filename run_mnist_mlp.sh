#!/usr/bin/env bash
# The paper's MNIST experiment: an MLP of width 200 on 1,000 images for 100,000 epochs.
#
#   sbatch run_mnist_mlp.sh [FLAGS]                     one run, in logs/ and checkpoints/ of the current folder
#   sbatch --array=0-9 run_mnist_mlp.sh --width=1000    seeds 0 to 9, in runs/width_1000_seed_0 ... width_1000_seed_9
#   bash run_mnist_mlp.sh [FLAGS]                       the same without SLURM
#
# FLAGS are train.py's and win over those below. sbatch's own options, such as --partition, --account, --time or, to do
# without a GPU, --gres=none, go before the script's name. What the job prints is in logs/slurm-JOB.out. A job that is
# preempted or runs out of time saves its state, is requeued and continues by itself; one that was cancelled or failed
# continues when it is submitted again with the same FLAGS.

#SBATCH --gres=gpu:1
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
# Two minutes before its time is up SLURM asks this script, by a signal, to stop.
#SBATCH --signal=B:USR1@120
# SLURM makes no folder for a job's output and fails without it, so this script opens the file in logs/ itself.
#SBATCH --output=/dev/null

flags=(--model=mlp --dataset=mnist --train_size=1000 --batch_size=200 --lr=0.001 --weight_decay=0.01 --device=auto)
[[ " $*" == *" --n_steps"* ]] || flags+=(--n_epochs=100000)

if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    # A folder named by the flags and the seed: a task finds its own again, and two sweeps do not meet.
    name="$* seed $SLURM_ARRAY_TASK_ID"
    name=$(sed 's/--//g; s/^ //; s/[^A-Za-z0-9.,]/_/g' <<<"$name")
    (( ${#name} > 150 )) && name=${name:0:100}_$(cksum <<<"$*" | cut -d' ' -f1)_seed_$SLURM_ARRAY_TASK_ID
    flags+=(--seed="$SLURM_ARRAY_TASK_ID" --log_dir="runs/$name/logs" --save_dir="runs/$name/checkpoints")
fi

here=$(dirname "$0")
if [[ $0 == */slurm_script ]]; then  # a batch job: SLURM runs a copy, by this name, from a folder of its own
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    here=$(scontrol show job "$job" | sed -n 's|^ *Command=\(.*\)/[^/ ]*\.sh.*|\1|p')
    [[ -f $here/train.py ]] || here=$SLURM_SUBMIT_DIR
    if [[ /dev/stdout -ef /dev/null ]]; then
        mkdir -p logs
        exec >>"logs/slurm-$job.out" 2>&1
    fi
    echo "job $job on $(hostname), $(date), restarts: ${SLURM_RESTART_COUNT:-0}"
fi

for python in "${VIRTUAL_ENV:-$here/.venv}/bin/python" "$here/.venv/bin/python" python python3; do
    command -v "$python" >/dev/null && break
done
train=("$python" "$here/train.py" "${flags[@]}" --resume "$@")

[[ $0 == */slurm_script ]] || exec "${train[@]}"

# In a batch job the signals arrive here: hand them on, and wait until the run has saved its state.
trap 'kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
"${train[@]}" &
run=$!
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
    echo "requeueing job $job"
    scontrol requeue "$job" || echo "job $job cannot be requeued here: submit it again with the same flags to continue"
fi
exit "$status"
