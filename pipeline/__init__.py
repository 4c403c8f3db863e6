"""What happens, and in which order: see `pipeline/stages.py`."""
