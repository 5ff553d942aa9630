"""Sharing SAEs: the Hub, and the formats of other tools."""
