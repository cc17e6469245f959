#!/bin/bash
# A SLURM of one node, this machine, in a folder of its own:  slurm_node.sh start|stop FOLDER
# For tests. Nothing of an installed SLURM's configuration is used or changed; it is stopped by the pids in FOLDER.
# Needs root and Debian's slurm-wlm and munge (apt-get install --no-install-recommends slurm-wlm munge).
set -eu
what=$1 folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
port=${SLURM_TEST_PORT:-$((20000 + 2 * ($$ % 5000)))}

wait_for() { for _ in $(seq 150); do if "$@" >/dev/null 2>&1; then return; fi; sleep 0.2; done; echo "in vain: $*" >&2; tail -n 20 "$folder"/*.log >&2; exit 1; }

start() {
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 755 "$folder"; chmod 700 "$folder/munge"
    dd if=/dev/urandom of="$folder/munge/key" bs=128 count=1 2>/dev/null
    chmod 400 "$folder/munge/key"
    cat > "$SLURM_CONF" <<EOF
ClusterName=questctl-test
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0,requeue_delay=1
KillWait=20
MinJobAge=300
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$(nproc --all) State=UNKNOWN
PartitionName=test Nodes=$(hostname) Default=YES MaxTime=INFINITE State=UP
EOF
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge/seed"
    slurmctld -i -c
    wait_for scontrol ping
    slurmd
    wait_for sh -c 'sinfo --noheader --format=%t | grep -q idle'
}

stop() {
    scancel --quiet --full --signal=KILL --user=root 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] || continue
        pid=$(cat "$folder/$name.pid")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.2; done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

"$what"
