"""The lender: who is lent what and who gives way, without I/O and without a clock."""
