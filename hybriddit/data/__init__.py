"""Training data: latents and prompt embeddings, made by the teacher itself, in memory or in a cache on disk."""
