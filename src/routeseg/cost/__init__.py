"""What a route costs: MACs (macs.py), the budget that gates learn (budget.py), milliseconds (latency.py). No torch."""
