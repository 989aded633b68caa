"""BM25, FAISS, candidate pools, run files, measures. No jax here but for search on the devices."""
