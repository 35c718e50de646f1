"""The load generator: what one worker on one core costs, with exact counts. See README.md."""
