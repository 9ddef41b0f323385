"""Triton's and KServe's v2 over HTTP."""
