"""The kernel on the other side: mount, handshake, requests as they arrive, what it is told to forget."""
