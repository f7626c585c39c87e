"""Runs and models as one HTML page and PNG figures."""
