"""A DAG of stages brought up to date, and the commands that look at it: plan, verify, retry, gc."""
