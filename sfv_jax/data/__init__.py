"""Video files, data sets, latent caches, the loader, and the procedural world."""
