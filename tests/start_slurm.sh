#!/usr/bin/env bash
# Start or stop a SLURM whose only node is this machine, for the tests. Needs Debian's packages slurm-wlm and munge.
#
#   export SLURM_CONF=$(tests/start_slurm.sh start FOLDER)
#   tests/start_slurm.sh stop FOLDER
#
# All its files are in FOLDER, which must not exist yet. The node claims two CPUs, 16 GB and two GPUs, so that jobs that
# ask for these are scheduled whatever the machine has.
set -eu
folder=$(realpath -m "$2")

stop() {
    for daemon in slurmd slurmctld munged; do
        if [[ -s $folder/$daemon.pid ]]; then kill "$(<"$folder/$daemon.pid")" 2>/dev/null || true; fi
    done
}

if [[ $1 == stop ]]; then stop; exit; fi

mkdir "$folder" "$folder/state" "$folder/spool"
chmod 755 "$folder"
(umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
export PATH=$PATH:/usr/sbin:/sbin
munged --key-file="$folder/munge.key" --socket="$folder/munge.sock" --pid-file="$folder/munged.pid" \
       --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" --force 2>"$folder/munged.err"

host=$(hostname -s)
user=$(id -un)
port=$((20000 + RANDOM % 10000))
# cred_expire: how long SLURM waits after a requeue, by default two minutes.
cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPort=$port
SlurmdPort=$((port + 1))
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,bf_interval=1
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:2
PartitionName=main Nodes=$host Default=YES
CONF
echo "NodeName=$host Name=gpu File=/dev/null,/dev/zero" >"$folder/gres.conf"
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd
for _ in $(seq 40); do
    if [[ $(timeout 2 sinfo -h -o %T 2>/dev/null) == idle ]]; then echo "$SLURM_CONF"; exit; fi
    sleep 0.25
done
stop
echo "SLURM does not start: see $folder/*.log" >&2
exit 1
