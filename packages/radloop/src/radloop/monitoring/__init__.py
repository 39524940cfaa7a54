"""Watching a model in production: drift, performance, labelling requests, alerts, and the report."""
