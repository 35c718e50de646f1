"""What runs in a child process of trioserver: workers, the gateway, and what they are made of."""

__version__ = "0.1.0"
