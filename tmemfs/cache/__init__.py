"""Pages in memory: the bounded cache, what is evicted from it, and the way into the pool."""
