"""Routes over a data set (routes.py), and what they say about its images (route_statistics.py)."""
