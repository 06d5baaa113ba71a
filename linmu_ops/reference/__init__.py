"""The definitions: each op in short, plain PyTorch. Slow, differentiable, and the judge of every fast kernel."""
