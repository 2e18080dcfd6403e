"""Machine and JAX support for all commands: compilation, meshes, processes, signals, progress, files."""
