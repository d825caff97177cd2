"""The cloud daemon: plans rounds, collects updates, aggregates them exactly."""
