"""Engines: what turns a pipeline into something that runs. Each is one module, and imports no other engine."""
