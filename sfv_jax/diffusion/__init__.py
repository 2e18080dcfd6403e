"""The mathematics of the method, pure functions: noise levels, preconditioning, losses, samplers of a network."""
