"""The guest's side: slabs on loan, and the connection that brings them."""
