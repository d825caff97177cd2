"""The agent's decisions without I/O: events in, actions out, time as an argument."""
