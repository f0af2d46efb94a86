"""Parametrizations: what each promises per role, as literal tables of monomials with their sources."""
