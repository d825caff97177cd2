"""Looks at one machine as the daemons would find it, and says what is wrong and what to do next: `fedpipe doctor`.

    findings.py    what a look found, and the runner: every series of looks at once, each with an end of its own
    network.py     name, port, TLS and certificates on the way to the broker
    session.py     what the broker lets us do once we are there
    machine.py     folders, disk, memory, files that must be private, the systemd unit
    training.py    GPU, torch, base models, data sets
    api.py         the coordinator's HTTP API, and the two clocks
    roles.py       which series belong to which role

A series is a generator of findings, named beforehand: when one look fails in it, those behind it are said to be skipped, so a
report always has every line.  Nothing is changed on the machine, but for one file that is written and deleted again.
"""
