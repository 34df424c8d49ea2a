"""Figures and one static page, drawn from run folders alone: no torch, no network, no objects."""
