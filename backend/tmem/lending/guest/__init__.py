"""The guest's side: the slabs on loan and the connection to tmemd."""
