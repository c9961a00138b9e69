"""The commands of tools/plan.py but `sync`."""
