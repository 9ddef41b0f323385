"""Sockets: HTTP/1.1, HTTP/2, TLS, and what a client may cost."""
