"""Personalised RLHF within bounds: one DPO adapter per user, tier-one refusals kept."""
