"""Names and attributes: lookup, create, rename, listings, open."""
