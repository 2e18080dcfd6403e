"""Videos in and out, latent caches, the loader, and the procedural world."""
