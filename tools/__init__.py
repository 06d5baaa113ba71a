"""What made the shipped files, once; not installed."""
