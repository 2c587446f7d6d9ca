"""What a route costs: MACs (macs.py) and milliseconds (latency.py). No torch."""
