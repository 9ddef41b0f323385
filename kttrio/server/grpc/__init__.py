"""Triton's service over gRPC."""
