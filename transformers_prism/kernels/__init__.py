"""One operation per file: its definition in PyTorch, its Triton kernels, its operator and the choice between them."""
