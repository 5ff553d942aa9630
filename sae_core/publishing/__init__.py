"""Sharing SAEs on the Hub."""
