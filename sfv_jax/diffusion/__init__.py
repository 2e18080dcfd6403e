"""The mathematics of the method as pure functions: noise levels, preconditioning, losses, samplers of a network."""
