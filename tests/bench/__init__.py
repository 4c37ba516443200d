"""Measurements, opt-in: `pytest -m bench -n 0`. Each prints its table; what is compared runs side by side."""
