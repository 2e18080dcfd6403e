"""What every command needs of the machine and of JAX: compilation, meshes, processes, signals, progress, files."""
