"""Scored responses of many sources -> best answers and preference pairs."""
