"""liblinmu_cuda.so, which `linmu_ops` loads from here unless its own folder has one. There is nothing to call."""
