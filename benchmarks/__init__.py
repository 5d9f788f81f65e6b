"""Commands that reproduce the published figures."""
