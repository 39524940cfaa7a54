"""What tests and the demo use: conformance suites, phantoms, a simulated modality, synthetic PHI."""
