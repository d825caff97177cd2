"""The operator's face: the `fedpipe` command, the demo, the embedded broker."""
