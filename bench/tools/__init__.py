"""What measures have in common: children, sizes, content, reports."""
