"""The lender: decides who is lent slabs and who must give slabs back, without I/O and without a clock."""
