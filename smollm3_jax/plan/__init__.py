"""What a topology would give: the real steps, compiled for devices that are not there, and asked what they cost.

Memory is the compiler's own figure. Times are modelled by `sharding.roofline`, and reports say so.
"""
