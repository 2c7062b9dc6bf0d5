"""Operations: what the kernel asks, what it is answered, and the virtual files."""
