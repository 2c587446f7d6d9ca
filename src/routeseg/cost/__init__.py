"""What a route costs: MACs (macs.py), milliseconds (latency.py). No torch."""
