"""Addresses: blocks, pools, and the one server on a node that hands out of them."""
