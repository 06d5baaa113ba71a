"""Triton kernels: the GPU path where no CUDA compiler was there, and on AMD. Imported on first use."""
