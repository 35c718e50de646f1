"""What runs in the parent: it forks, watches, restarts and drains, and does nothing else."""
