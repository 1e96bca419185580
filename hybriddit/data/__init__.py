"""Training data, in memory or in a cache on disk: latents with prompt embeddings, and images with class labels."""
