"""Ranking for others: an HTTP server with its page, and bulk scoring."""
