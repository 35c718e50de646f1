"""What runs in the parent process: it forks, watches, restarts and drains, and does nothing else."""
