"""tmemctl, as a person meets it."""
