"""One file per op: its cases, what they cost at least, and who else can compute them."""
