"""Recipes of shardtune from the configs of other trainers."""
