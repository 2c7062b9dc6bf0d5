"""tmemctl: the verbs of a person."""
