"""Measurements that leave a JSON file under `bench/results/`; README quotes nothing else."""
