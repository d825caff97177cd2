"""Who trains what: from a job and its agents' surveys and reports to one Choice per agent.  Pure functions."""
