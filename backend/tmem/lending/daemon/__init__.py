"""tmemd's process: connects the lender with sockets, memory and time."""
