"""Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept."""

__version__ = "0.1.0"
