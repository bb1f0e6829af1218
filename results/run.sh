#!/usr/bin/env bash
# Every experiment whose history is in results/: runs those named, or all of them, two at a time, and writes the history
# of each that is complete to results/NAME.json. An interrupted one continues when it is named again.
#
#   bash results/run.sh                      all, about a day on two cores
#   bash results/run.sh mnist mnist_exact    these two
#   bash results/run.sh mnist_branch_exact   after `mnist`, from one of whose checkpoints it starts (so does every line
#                                            with --branch_from)
#   bash results/run.sh --list               only print the names and the flags
#   JOBS=8 DATA=/scratch/data RUNS=/scratch/runs bash results/run.sh
set -u
cd "$(dirname "$0")/.."
export DATA=${DATA:-data} RUNS=${RUNS:-runs/results} PYTHON=${PYTHON:-python}

listed() {
    cat <<'END'
first                   --preset=first
first_init1             --preset=first --init_scale=1
first_decay0            --preset=first --weight_decay=0
first_ce                --preset=first --loss=ce
mnist                   --dataset=mnist --n_steps=100000
mnist_exact             --dataset=mnist --n_steps=100000 --loss=exact_ce
digits                  --dataset=digits --n_steps=100000
digits_exact            --dataset=digits --n_steps=100000 --loss=exact_ce
mnist_seed1             --dataset=mnist --n_steps=100000 --seed=1
mnist_exact_seed1       --dataset=mnist --n_steps=100000 --seed=1 --loss=exact_ce
mnist_seed2             --dataset=mnist --n_steps=100000 --seed=2
mnist_exact_seed2       --dataset=mnist --n_steps=100000 --seed=2 --loss=exact_ce
mnist_seed3             --dataset=mnist --n_steps=100000 --seed=3
mnist_exact_seed3       --dataset=mnist --n_steps=100000 --seed=3 --loss=exact_ce
mnist_float64           --dataset=mnist --n_steps=100000 --dtype=float64
mnist_float64_seed1     --dataset=mnist --n_steps=100000 --dtype=float64 --seed=1
mnist_exact_eps         --dataset=mnist --n_steps=100000 --loss=exact_ce --adam_eps=1e-15
mnist_depth6            --dataset=mnist --n_steps=100000 --depth=6
mnist_depth6_exact      --dataset=mnist --n_steps=100000 --depth=6 --loss=exact_ce
mnist_depth2            --dataset=mnist --n_steps=100000 --depth=2
mnist_depth2_exact      --dataset=mnist --n_steps=100000 --depth=2 --loss=exact_ce
mnist_stablemax         --dataset=mnist --n_steps=100000 --loss=stablemax
mnist_orthogonal        --dataset=mnist --n_steps=100000 --orthogonal_gradient
mnist_adam              --dataset=mnist --n_steps=100000 --optimizer=adam
mnist_adam_exact        --dataset=mnist --n_steps=100000 --optimizer=adam --loss=exact_ce
digits_large_init       --dataset=digits --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1
mnist_large_init        --dataset=mnist --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1
mnist_batch_norm        --dataset=mnist --n_steps=100000 --batch_norm
mnist_batch_norm_exact  --dataset=mnist --n_steps=100000 --batch_norm --loss=exact_ce
mnist_long              --dataset=mnist --n_epochs=100000
mnist_long_exact        --dataset=mnist --n_epochs=100000 --loss=exact_ce
mnist_depth3            --dataset=mnist --n_steps=100000 --depth=3
mnist_depth5            --dataset=mnist --n_steps=100000 --depth=5
mnist_width50           --dataset=mnist --n_steps=100000 --width=50
mnist_width100          --dataset=mnist --n_steps=100000 --width=100
mnist_from_image        --dataset=mnist --n_steps=100000 --log_points=20 --pgd_start=image
mnist_stablemax_from_image --dataset=mnist --n_steps=100000 --log_points=20 --pgd_start=image --loss=stablemax
mnist_random_labels     --dataset=mnist --n_steps=50000 --label_noise=1
mnist_decay0            VARIED --weight_decay=0
mnist_decay0_exact      VARIED --weight_decay=0 --loss=exact_ce
mnist_decay0.001        VARIED --weight_decay=0.001
mnist_decay0.001_exact  VARIED --weight_decay=0.001 --loss=exact_ce
mnist_decay0.1          VARIED --weight_decay=0.1
mnist_decay0.1_exact    VARIED --weight_decay=0.1 --loss=exact_ce
mnist_decay1            VARIED --weight_decay=1
mnist_decay1_exact      VARIED --weight_decay=1 --loss=exact_ce
mnist_train300          VARIED --train_size=300
mnist_train300_exact    VARIED --train_size=300 --loss=exact_ce
mnist_train3000         VARIED --train_size=3000
mnist_train3000_exact   VARIED --train_size=3000 --loss=exact_ce
mnist_train10000        VARIED --train_size=10000
mnist_train10000_exact  VARIED --train_size=10000 --loss=exact_ce
mnist_width20           VARIED --width=20
mnist_width20_exact     VARIED --width=20 --loss=exact_ce
mnist_width1000         VARIED --width=1000
mnist_width1000_exact   VARIED --width=1000 --loss=exact_ce
mnist_gelu              VARIED --activation=gelu
mnist_gelu_exact        VARIED --activation=gelu --loss=exact_ce
mnist_leaky_relu        VARIED --activation=leaky_relu
mnist_leaky_relu_exact  VARIED --activation=leaky_relu --loss=exact_ce
modular_ce                  MODULAR --weight_decay=0 --n_steps=100000
modular_exact               MODULAR --weight_decay=0 --n_steps=100000 --loss=exact_ce
modular_stablemax           MODULAR --weight_decay=0 --n_steps=100000 --loss=stablemax
modular_orthogonal          MODULAR --weight_decay=0 --n_steps=100000 --orthogonal_gradient
modular_exact_eps           MODULAR --weight_decay=0 --n_steps=100000 --loss=exact_ce --adam_eps=1e-25
modular_float64             MODULAR --weight_decay=0 --n_steps=100000 --dtype=float64
modular_decay_ce            MODULAR --weight_decay=1 --n_steps=20000
modular_decay_exact         MODULAR --weight_decay=1 --n_steps=20000 --loss=exact_ce
modular_decay_stablemax     MODULAR --weight_decay=1 --n_steps=20000 --loss=stablemax
modular_decay_orthogonal    MODULAR --weight_decay=1 --n_steps=20000 --orthogonal_gradient
modular_decay_exact_eps     MODULAR --weight_decay=1 --n_steps=20000 --loss=exact_ce --adam_eps=1e-25
modular_decay_float64       MODULAR --weight_decay=1 --n_steps=20000 --dtype=float64
cnn                     CIFAR
cnn_exact               CIFAR --loss=exact_ce
cnn_decay               CIFAR --weight_decay=0.01
cnn_batch_norm          CIFAR --n_steps=20000 --batch_norm
resnet18                CIFAR --model=resnet18 --n_steps=50000
resnet18_whole          WHOLE
resnet18_whole_seed1    WHOLE --seed=1
resnet18_whole_exact    WHOLE --log_from=2504 --log_points=10 --loss=exact_ce --branch_from=RUNS/resnet18_whole/checkpoints/checkpoint_epoch_0000005_step_000003970.pt
resnet18_batch_norm     CIFAR --model=resnet18 --n_steps=20000 --batch_norm --log_points=25
theirs_orthogonal       THEIRS --orthogonal_gradient --n_steps=20000
theirs_ce               THEIRS --n_steps=20000
theirs_exact            THEIRS --loss=exact_ce --n_steps=20000
theirs_stablemax        THEIRS --loss=stablemax --n_steps=20000
theirs_float64          THEIRS --dtype=float64 --n_steps=20000
mnist_branch_exact      --dataset=mnist --n_steps=100000 --loss=exact_ce --branch_from=RUNS/mnist/checkpoints/checkpoint_epoch_0002169_step_000010846.pt
mnist_exact_branch_ce   --dataset=mnist --n_steps=100000 --branch_from=RUNS/mnist_exact/checkpoints/checkpoint_epoch_0002169_step_000010846.pt
digits_mse              --dataset=digits --n_steps=100000 --loss=mse --weight_decay=0.1
digits_init8            --dataset=digits --n_steps=100000 --init_scale=8
digits_seed1            --dataset=digits --n_steps=100000 --seed=1
digits_init8_seed1      --dataset=digits --n_steps=100000 --init_scale=8 --seed=1
mnist_branch_exact_seed1 --dataset=mnist --n_steps=100000 --loss=exact_ce --seed=1 --branch_from=RUNS/mnist_seed1/checkpoints/checkpoint_epoch_0002169_step_000010846.pt
mnist_exact_branch_ce_seed1 --dataset=mnist --n_steps=100000 --seed=1 --branch_from=RUNS/mnist_exact_seed1/checkpoints/checkpoint_epoch_0002169_step_000010846.pt
digits_exact_seed1      --dataset=digits --n_steps=100000 --loss=exact_ce --seed=1
digits_mse_seed1        --dataset=digits --n_steps=100000 --loss=mse --weight_decay=0.1 --seed=1
mnist_seed4             --dataset=mnist --n_steps=100000 --seed=4
mnist_exact_seed4       --dataset=mnist --n_steps=100000 --seed=4 --loss=exact_ce
mnist_seed5             --dataset=mnist --n_steps=100000 --seed=5
mnist_exact_seed5       --dataset=mnist --n_steps=100000 --seed=5 --loss=exact_ce
mnist_lr0.003           VARIED --lr=0.003
mnist_lr0.003_exact     VARIED --lr=0.003 --loss=exact_ce
mnist_sgd               VARIED --optimizer=sgd --momentum=0.9 --lr=0.1 --weight_decay=0.0001
mnist_sgd_exact         VARIED --optimizer=sgd --momentum=0.9 --lr=0.1 --weight_decay=0.0001 --loss=exact_ce
mnist_mse               VARIED --loss=mse --weight_decay=0.1
mnist_init8             VARIED --init_scale=8
theirs113_orthogonal    THEIRS --modulus=113 --batch_size=5108 --orthogonal_gradient --n_steps=1000
digits_init8_exact      --dataset=digits --n_steps=100000 --init_scale=8 --loss=exact_ce
mnist_init8_exact       VARIED --init_scale=8 --loss=exact_ce
mnist_mse_seed1         VARIED --loss=mse --weight_decay=0.1 --seed=1
digits_large_init_seed1 --dataset=digits --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1 --seed=1
mnist_lr0.0003          VARIED --lr=0.0003
mnist_init8_seed1       VARIED --init_scale=8 --seed=1
theirs_long_exact       THEIRS --loss=exact_ce --n_steps=80000
theirs_long_stablemax   THEIRS --loss=stablemax --n_steps=80000
mnist_lr0.0003_exact    VARIED --lr=0.0003 --loss=exact_ce
mnist_lr0.003_seed1     VARIED --lr=0.003 --seed=1
mnist_lr0.003_exact_seed1 VARIED --lr=0.003 --loss=exact_ce --seed=1
mnist_sgd_seed1         VARIED --optimizer=sgd --momentum=0.9 --lr=0.1 --weight_decay=0.0001 --seed=1
digits_seed2            --dataset=digits --n_steps=100000 --seed=2
digits_exact_seed2      --dataset=digits --n_steps=100000 --loss=exact_ce --seed=2
mnist_large_init_seed1  --dataset=mnist --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1 --seed=1
mnist_init8_exact_seed1 VARIED --init_scale=8 --loss=exact_ce --seed=1
mnist_sgd_exact_seed1   VARIED --optimizer=sgd --momentum=0.9 --lr=0.1 --weight_decay=0.0001 --loss=exact_ce --seed=1
mnist_lr0.0003_seed1    VARIED --lr=0.0003 --seed=1
mnist_lr0.0003_exact_seed1 VARIED --lr=0.0003 --loss=exact_ce --seed=1
mnist_depth2_seed1      --dataset=mnist --n_steps=100000 --depth=2 --seed=1
mnist_depth2_exact_seed1 --dataset=mnist --n_steps=100000 --depth=2 --loss=exact_ce --seed=1
digits_large_init_seed2 --dataset=digits --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1 --seed=2
mnist_large_init_seed2  --dataset=mnist --n_steps=100000 --init_scale=8 --loss=mse --weight_decay=0.1 --seed=2
mnist_depth2_seed2      --dataset=mnist --n_steps=100000 --depth=2 --seed=2
mnist_depth2_exact_seed2 --dataset=mnist --n_steps=100000 --depth=2 --loss=exact_ce --seed=2
digits_init8_exact_seed1 --dataset=digits --n_steps=100000 --init_scale=8 --loss=exact_ce --seed=1
mnist_adam_seed1        --dataset=mnist --n_steps=100000 --optimizer=adam --seed=1
mnist_batch_norm_seed1  --dataset=mnist --n_steps=100000 --batch_norm --seed=1
mnist_batch_norm_exact_seed1 --dataset=mnist --n_steps=100000 --batch_norm --loss=exact_ce --seed=1
mnist_adam_exact_seed1  --dataset=mnist --n_steps=100000 --optimizer=adam --loss=exact_ce --seed=1
END
}

# CIFAR-10 as a folder of images, DATA/cifar10-images/{train,test}/CLASS/*.jpg; CIFAR: a tenth of it.
CIFAR="--preset=cnn --dataset=imagefolder"
WHOLE="--preset=resnet18 --dataset=imagefolder --compile=on"
# (a + b) mod 59, half of the pairs.
MODULAR="--preset=modular --lr=0.001 --log_points=40"
# As Prieto et al. train (arXiv:2501.04697), but for the modulus, 113 there: 40% of the pairs in one batch.
THEIRS="--dataset=modular_addition --modulus=59 --train_fraction=0.4 --depth=3 --batch_size=1392 --lr=0.01"
THEIRS+=" --weight_decay=0 --adam_eps=1e-25 --log_points=40 --epsilons 0.1 0.3 --adv_size=200 --lc_samples=128"
# The MNIST MLP for as long as `mnist`, to change one of its flags.
VARIED="--dataset=mnist --n_steps=100000 --log_points=30"

experiments() {
    listed | while read -r name flags; do
        for word in CIFAR WHOLE MODULAR THEIRS VARIED RUNS; do flags=${flags/$word/"${!word}"}; done
        echo "$name $flags"
        case $name in  # further seeds
            modular_*) seeds="0 1" ;;
            first) seeds="0 1 2 3" ;;
            mnist_decay* | mnist_train* | mnist_width20* | mnist_width1000 | mnist_leaky* | mnist_gelu*) seeds=1 ;;
            *) seeds= ;;
        esac
        for seed in $seeds; do echo "${name}_seed$seed $flags --seed=$seed"; done
    done
}

one() {
    read -r name flags <<<"$1"
    folder=$DATA
    [[ $flags == *=imagefolder* ]] && folder=$DATA/cifar10-images
    # shellcheck disable=SC2086  # the flags are several words
    "$PYTHON" train.py --threads=1 $flags --data_dir="$folder" \
        --log_dir="$RUNS/$name/logs" --save_dir="$RUNS/$name/checkpoints" --resume --quiet &&
        "$PYTHON" -c 'import sys; from records.history import *; write_history(sys.argv[2], read_history(sys.argv[1]))' \
            "$RUNS/$name/logs/training_history.json" "results/$name.json" && echo "$name is complete"
}
export -f one

[[ ${1:-} == --list ]] && { experiments; exit; }
for name in "$@"; do
    experiments | grep -q "^$name " || { echo "results/run.sh: there is no experiment $name" >&2; exit 2; }
done
experiments | while read -r line; do
    [[ $# == 0 || " $* " == *" ${line%% *} "* ]] && printf '%s\0' "$line"
done | xargs -0 -n 1 -P "${JOBS:-2}" bash -c 'one "$1"' _
