"""What the pool, tmemd and the mounts share: command lines, sizes, texts, logs, memory limits, calls into libc."""
