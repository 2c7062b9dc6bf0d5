"""tmemd's process: sockets, memory and time around the lender."""
