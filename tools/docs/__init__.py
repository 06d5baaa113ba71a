"""What makes the site of docs/: `make docs`."""
