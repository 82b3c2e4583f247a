"""Medusa-1 training: own answers, hidden states, heads, calibrated trees."""
