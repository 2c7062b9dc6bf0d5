"""Lending: the protocol, the ledger, the decisions, and what runs them."""
