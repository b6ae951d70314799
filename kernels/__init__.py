"""Triton kernels of the multi-layer perceptron: tensors in, tensors out; no autograd, no nn.Module."""
