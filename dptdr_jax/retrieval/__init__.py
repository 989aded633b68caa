"""Everything between vectors and a table of measures: search, BM25, runs, candidate pools, measures. No jax here."""
