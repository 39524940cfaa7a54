"""Serving: a predictor of Open Inference Protocol v2, Envoy in front of it, a judged way from one model to the next."""
