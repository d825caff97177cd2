"""The whole method beside published baselines: real training and real aggregation, on a virtual fleet and a virtual clock.

    python -m bench.pipeline            about an hour on two quiet cores; each run is kept, so a second start goes on
    python -m bench.pipeline --quick    two systems, two rounds

    world.py      a fleet of unlike servers: their text, their memory, what a step costs them, and when
    systems.py    what is compared: fedpipe, published baselines, fedpipe without one of its parts
    running.py    one system on one fleet, round by round
    jobs.py       many of these in a few processes, each kept when it is done
    summary.py    who reaches which loss when, and for how many bytes
    plots.py      the same as pictures

What is real: the base model, text, training, aggregation, planning, the size of updates.  What is computed: time and memory.
A step takes a server its speed factor times what the cost model, fitted to measurements of this machine, says; memory is the
formula of protocol/memory.py.  So results do not depend on what else this machine was doing.
"""
