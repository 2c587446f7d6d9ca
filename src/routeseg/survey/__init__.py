"""Routes over a data set (routes.py), what they say about its images (route_statistics.py), and how far the places of
images go (effort.py)."""
