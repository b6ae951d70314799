"""How a call becomes launches: the path for a problem, its kernels and torch products, autograd around them."""
