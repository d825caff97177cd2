#!/bin/bash
# What an operator does on a fresh server, run by systemd in a clean Debian; every answer is a line of /root/told.
set -u
exec >/root/afternoon.log 2>&1
set -x
told() { echo "$1=$2" >>/root/told; }
shown() { systemctl show --value -p "$2" "fedpipe-$1"; }
until_true() { for _ in $(seq 120); do "$@" && return 0; sleep 0.5; done; return 1; }
online() { fedpipe agents --json | grep -q '"online":true'; }

dpkg -i /root/fedpipe_*.deb; told dpkg $?
fedpipe-setup agent --wheels /wheels; told setup_agent $?
fedpipe-setup coordinator --wheels /wheels; told setup_coordinator $?
told config_mode "$(stat -c %a:%U:%G /etc/fedpipe)"

cat >/etc/fedpipe/coordinator.toml <<'T'
state_dir = "/var/lib/fedpipe-coordinator"
T
cat >/etc/fedpipe/agent.toml <<'T'
agent = "edge-a"
state_dir = "/var/lib/fedpipe-agent"
heartbeat_s = 5.0
[data.default]
path = "/srv/notes/notes.jsonl"
[base]
model_dirs = ["/srv/models"]
T
chgrp fedpipe /etc/fedpipe/*.toml; chmod 640 /etc/fedpipe/*.toml
fedpipe-agent check-config; told check $?

systemctl enable --now fedpipe-agent; told starts_without_broker $?
nothing_there() { shown agent StatusText | grep -q "no broker"; }
until_true nothing_there
told status_without_broker "$(shown agent StatusText)"
systemctl start mosquitto
systemctl enable --now fedpipe-coordinator; told coordinator $?
until_true online; told online $?
told user "$(ps -o user= -p "$(shown agent MainPID)")"

fedpipe submit /root/job.toml; told submit $?
timeout 240 fedpipe watch j >/dev/null; told watch $?
told job "$(fedpipe jobs --json)"
fedpipe export j --out /root/adapter; told export $?
told adapter "$(ls /root/adapter | tr '\n' ' ')"

before=$(shown agent NRestarts)
systemctl kill -s KILL --kill-whom=main fedpipe-agent
back() { [ "$(shown agent NRestarts)" -gt "$before" ] && [ "$(shown agent ActiveState)" = active ]; }
until_true back; told back_after_kill $?
systemctl stop fedpipe-agent; told stopped "$(shown agent Result)"
echo 'nonsense = 1' >>/etc/fedpipe/agent.toml
systemctl start fedpipe-agent
sleep 7 # longer than RestartSec: it must not have been tried again
told bad_config "$(shown agent ExecMainStatus) $(shown agent ActiveState)"
systemctl stop fedpipe-coordinator; told coordinator_stopped "$(shown coordinator Result)"
journalctl --no-pager -u fedpipe-agent -u fedpipe-coordinator >/root/journal.log
told traces "$(grep -c Traceback /root/journal.log)"
dpkg --purge fedpipe; told purge $?
told left "$(ls -d /opt/fedpipe /etc/fedpipe 2>/dev/null)"
systemctl poweroff
