"""Pixels: decoded, digested, measured, and turned into what a network sees. Knows no engine and no MLOps package."""
