#!/bin/bash
# What an operator does on a fresh server, run by systemd in a clean Debian; every answer is a line of /root/told.
# docs/howto/fleet.md on one machine: hub, server and operator.
set -u
exec >/root/afternoon.log 2>&1
set -x
export FEDPIPE_URL=https://localhost:8470 FEDPIPE_CA_FILE=/etc/mosquitto/fedpipe/ca.pem FEDPIPE_TOKEN_FILE=/etc/fedpipe/api.token
told() { echo "$1=$2" >>/root/told; }
shown() { systemctl show --value -p "$2" "fedpipe-$1"; }
until_true() { for _ in $(seq 240); do "$@" && return 0; sleep 0.5; done; return 1; }
online() { fedpipe agents --json | grep -q '"online":true'; }
away() { fedpipe agents --json | grep -q '"online":false'; }
pem=/var/lib/fedpipe-agent/identity/agent.pem

dpkg -i /root/fedpipe_*.deb; told dpkg $?
fedpipe-setup agent --wheels /wheels; told setup_agent $?
fedpipe-setup coordinator --wheels /wheels; told setup_coordinator $?
told config_mode "$(stat -c %a:%U:%G /etc/fedpipe)"

# the hub: authority, broker's configuration, coordinator
(umask 077; echo a-long-random-word >/etc/fedpipe/api.token); chown fedpipe: /etc/fedpipe/api.token
cat >/etc/fedpipe/coordinator.toml <<'T'
state_dir = "/var/lib/fedpipe-coordinator"
[broker]
url = "mqtts://localhost:8883"
[web]
host = "0.0.0.0"
token_file = "/etc/fedpipe/api.token"
[trust]
names = ["localhost"]
broker_dir = "/etc/mosquitto/fedpipe"
certificate_days = 0.003
T
chgrp fedpipe /etc/fedpipe/*.toml; chmod 640 /etc/fedpipe/*.toml
fedpipe-coordinator ca init; told ca_init $?
fedpipe mosquitto-config --out /etc/mosquitto/fedpipe --host localhost; told broker_config $?
install -m 644 /etc/mosquitto/fedpipe/mosquitto.conf /etc/mosquitto/conf.d/fedpipe.conf
systemctl enable --now fedpipe-mosquitto-reload.path; told reload_path $?
systemctl enable --now fedpipe-coordinator; told coordinator $?
told foreign "$(find /var/lib/fedpipe-coordinator ! -user fedpipe | tr '\n' ' ')"

# the server: enrolled by root, run by its own user
answers() { fedpipe jobs --json; }
until_true answers
token=$(fedpipe token --agent edge-a --auto-accept | head -n 1)
fedpipe enrol https://localhost:8443 --token "$token"; told enrol $?
cat >>/etc/fedpipe/agent.toml <<'T'
[data.default]
path = "/srv/notes/notes.jsonl"
[base]
model_dirs = ["/srv/models"]
T
fedpipe-agent check-config; told check $?
told identity "$(stat -c %a:%U:%G $pem)"
before=$(sha256sum $pem)
systemctl enable --now fedpipe-agent; told starts_without_broker $?
nothing_there() { shown agent StatusText | grep -q "no broker"; }
until_true nothing_there
told status_without_broker "$(shown agent StatusText)"
systemctl start mosquitto
until_true online; told online $?
broker=/proc/$(systemctl show --value -p MainPID mosquitto)
told broker "$(awk '/open files/ {print $4}' "$broker/limits") $(tr '\0' '\n' <"$broker/environ" | grep -c ^MALLOC_)"
told user "$(ps -o user= -p "$(shown agent MainPID)")"

fedpipe submit /root/job.toml; told submit $?
timeout 240 fedpipe watch j >/dev/null; told watch $?
told job "$(fedpipe jobs --json)"
fedpipe export j --out /root/adapter; told export $?
told adapter "$(ls /root/adapter | tr '\n' ' ')"

# its certificate lasts for minutes: the running unit gets the next one by itself, and starts with it
renewed() { journalctl --no-pager -u fedpipe-agent | grep -q "the certificate is renewed"; }
until_true renewed; told renewed $?
told renewed_pem "$(stat -c %a:%U:%G $pem) $([ "$(sha256sum $pem)" != "$before" ] && echo another)"
before=$(shown agent NRestarts)
systemctl kill -s KILL --kill-whom=main fedpipe-agent
back() { [ "$(shown agent NRestarts)" -gt "$before" ] && [ "$(shown agent ActiveState)" = active ]; }
until_true back; told back_after_kill $?
until_true online; told online_after_kill $?

# thrown out: at once by the coordinator, and by the broker once it has read what the coordinator's unit wrote for it
fedpipe revoke edge-a --reason stolen; told revoke $?
over() { [ "$(shown agent ActiveState)" = failed ]; }
refused() { grep -q "^topic deny" /etc/mosquitto/fedpipe/acl && systemctl restart fedpipe-agent; until_true over; }
refused; told revoked "$(shown agent ExecMainStatus)"
systemctl reset-failed fedpipe-agent
token=$(fedpipe token --agent edge-a --auto-accept | head -n 1)
fedpipe enrol https://localhost:8443 --token "$token" --again; told enrol_again $?
systemctl start fedpipe-agent
until_true online; told online_again $?

# the next authority: both are trusted until the agent has renewed, then one; a job is trained under it
fedpipe-coordinator ca rotate; told rotate $?
systemctl restart fedpipe-coordinator
learned() { [ "$(grep -c BEGIN /var/lib/fedpipe-agent/identity/ca.pem)" = 2 ]; }
until_true learned; told learned $?
fedpipe-coordinator ca show; fedpipe-coordinator ca retire; told retire $?
systemctl restart fedpipe-coordinator
until_true answers
sed 's/"j"/"k"/' /root/job.toml >/root/next.toml
fedpipe submit /root/next.toml; told next_submit $?
timeout 240 fedpipe watch k >/dev/null; told next_watch $?
fedpipe audit verify; told audit $?
told audited "$(fedpipe audit show --json | grep -c '"action":"enrol"')"

systemctl stop fedpipe-agent; told stopped "$(shown agent Result)"
echo 'nonsense = 1' >>/etc/fedpipe/agent.toml
systemctl start fedpipe-agent
sleep 7 # longer than RestartSec: it must not have been tried again
told bad_config "$(shown agent ExecMainStatus) $(shown agent ActiveState)"
told foreign_after "$(find /var/lib/fedpipe-coordinator /var/lib/fedpipe-agent ! -user fedpipe | tr '\n' ' ')"
systemctl stop fedpipe-coordinator; told coordinator_stopped "$(shown coordinator Result)"
journalctl --no-pager -u fedpipe-agent -u fedpipe-coordinator >/root/journal.log
told traces "$(grep -c Traceback /root/journal.log)"
dpkg --purge fedpipe; told purge $?
told left "$(ls -d /opt/fedpipe /etc/fedpipe 2>/dev/null)"
systemctl poweroff
