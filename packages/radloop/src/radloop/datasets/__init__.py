"""Datasets: images checked, versions named by their content, patients kept in one part, tensors on disk."""
