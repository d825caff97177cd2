"""Faults on purpose: a proxy and a network that misbehave, and a soak of a real fleet under random faults.  Not in the wheel."""
