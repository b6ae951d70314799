"""The way from a call to its launches: the choice of a path, its kernels and torch's products, and autograd."""
