"""`python -m bench.models.run`: prefill, decode and memory of a student beside its teacher."""
