"""`linmu bench model`: prefill, decode and memory of a student beside its teacher."""
