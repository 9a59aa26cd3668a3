"""The truth: every op of `ling_ops` in plain PyTorch, on any device, in up to float64.

Used as the fallback where no kernel runs, and by the tests as what kernels are compared with.
"""
