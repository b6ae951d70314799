"""From a call to its launches: the path for a problem, its kernels and torch products, autograd around them."""
